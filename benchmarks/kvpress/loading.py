"""The model, in float32 on the CPU, from a directory of safetensors."""

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.kvpress.windows import UserError, Window

KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that kvpress knows and whose layers all attend alike."""


def load(directory: Path) -> Any:
    """The model with sdpa attention.

    Raises:
        UserError: no folder of a model in safetensors, or of a kind that cannot be scored here.
    """
    import torch  # these here, since offline mode is set before they are read
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    if not (directory / "config.json").is_file() or not list(directory.glob("*.safetensors")):
        raise UserError(
            f"--model {directory} is no folder with a config.json and safetensors; give such a folder, or run "
            "`make peers`, which finds the demo model's"
        )
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    check_scorable(config)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="sdpa",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    return model.eval()


def check_scorable(config: Any) -> None:
    """Raise UserError for a model that kvpress or the masks of this comparison would treat wrongly."""
    if config.model_type not in KINDS:
        raise UserError(f"a model of type {config.model_type!r} is not compared here; give one of {', '.join(KINDS)}")
    if getattr(config, "sliding_window", None):
        raise UserError(
            f"the model's layers see {config.sliding_window} tokens, but presses and masks here are for layers that "
            "see all; give a model without sliding windows"
        )


def digest(directory: Path, window: Window) -> str:
    """What a score depends on: the model's files (by size and time), the window's ids, and the libraries."""
    files = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in sorted(directory.iterdir())]
    content = json.dumps([files, window.ids, window.context, versions()])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of the libraries that decide on the scores."""
    return {name: metadata.version(name) for name in ("kvpress", "transformers", "torch")}
