"""What baklava costs and gains in time and memory, next to transformers' own cache.

Examples:
  python jobs/benchmark.py decode
  python jobs/benchmark.py decode --contexts 8192 --batches 1 4 --json runs/decode.json
  python jobs/benchmark.py prefill --contexts 1024 2048 --no-memory

All contestants take turns in one process; figures are medians over rounds, ratios are taken round by round. Beside the
JSON lies a picture with the same name.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from baklava.errors import UserError
from baklava.files import write_whole
from baklava.model import load
from baklava.progress import say
from baklava.script import exit_code
from benchmarks.decode import decode
from benchmarks.picture import draw, table
from benchmarks.prefill import prefill


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=("decode", "prefill"), help="what is measured")
    parser.add_argument("--model", default="demo", help="demo, a directory, or a hub id (default: demo)")
    parser.add_argument("--contexts", type=int, nargs="+", metavar="N", help="tokens in the cache or the prompt")
    parser.add_argument("--batches", type=int, nargs="+", metavar="N", help="sequences at a time")
    parser.add_argument("--share", type=float, default=0.2, help="share of the entries that plans keep (default: 0.2)")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 8 for decode, 3 for prefill)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--no-memory", action="store_true", help="prefill: leave out the peaks of memory")
    parser.add_argument("--json", type=Path, help="where the figures go (default: runs/benchmark-NAME.json)")
    return parser.parse_args(arguments)


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    loaded = load(chosen.model, threads=chosen.threads)
    contexts = chosen.contexts or [1024, 2048, 4096, 8192]
    if chosen.name == "decode":
        return decode(loaded, contexts, chosen.batches or [1, 4, 8], chosen.share, chosen.rounds or 8)
    return prefill(loaded, contexts, chosen.batches or [1], chosen.share, chosen.rounds or 3, not chosen.no_memory)


def main() -> None:
    chosen = parse()
    if not 0 < chosen.share < 1:
        raise UserError(f"--share {chosen.share}: the share of the entries kept is between 0 and 1; try 0.2")
    figures = measure(chosen)
    path = chosen.json or Path("runs") / f"benchmark-{chosen.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(figures, indent=1) + "\n")
    draw(figures, path.with_suffix(".png"))
    print(table(figures))
    say(f"figures: {path}, picture: {path.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(exit_code("benchmark", main))
