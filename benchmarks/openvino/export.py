"""Export a model to OpenVINO's format with float32 weights, offline.

Example:
  benchmarks/openvino/.venv/bin/python -m benchmarks.openvino.export path/to/model path/to/exported
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

OFFLINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Export the model; the target folder appears only when it is complete."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.openvino.export",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="folder of a model in safetensors, with its tokenizer.json")
    parser.add_argument("target", type=Path, help="folder to write, which must not exist")
    args = parser.parse_args(argv)
    os.environ |= OFFLINE_ENVIRONMENT
    # imported here, since offline mode must be set before
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    args.target.parent.mkdir(parents=True, exist_ok=True)
    part = args.target.with_name(f".{args.target.name}.{os.getpid()}.part")
    main_export(
        str(args.source), part, task="text-generation-with-past", ov_config=OVConfig(dtype="fp32"), stateful=True
    )
    part.rename(args.target)


if __name__ == "__main__":
    main()
