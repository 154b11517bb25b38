"""Score kvpress's presses on token windows, against the full cache of the same model.

Examples:
  make peers WINDOWS=windows.json
  make peers WINDOWS=windows.json ARGS="--presses snapkv kvzip --kept 0.3 0.125 --json runs/kvpress.json"
  make peers WINDOWS=windows.json MODEL=path/to/model ARGS="--bytes 0.3"
  benchmarks/kvpress/.venv/bin/python -m benchmarks.kvpress.cli --model path/to/model --windows windows.json

--kept gives the share of the context's entries that stay. --bytes gives the share of all bytes at the end of the
window; kvpress evicts nothing of the continuation, so its entries leave the context that much less. Finished windows
are kept in a .jsonl beside the JSON: the same command goes on where an earlier one was ended.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.kvpress.loading import UserError, Window, digest, exit_code, load, read_windows, validate_for, versions
from benchmarks.kvpress.presses import FULL, PRESSES, Press, press_of
from benchmarks.kvpress.results import Compression, Geometry, Journal, Row, plan_name, plan_of, table, write

QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
DEFAULT_KEPT = (0.3, 0.125)


@dataclass(frozen=True)
class Job:
    """A press and how much it keeps: `entries` of the context, a mean per KV head."""

    name: str
    press: Press
    compression: str
    entries: int

    @property
    def plan(self) -> str:
        """Name of the plan in the output."""
        return plan_name(self.name, self.compression)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kvpress.cli",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--windows", type=Path, required=True, help="JSON file of token windows (see README.md)")
    parser.add_argument("--model", type=Path, required=True, help="folder of a model in safetensors")
    parser.add_argument(
        "--presses", nargs="+", default=list(PRESSES), metavar="NAME", help=f"of {', '.join(PRESSES)} (default: all)"
    )
    parser.add_argument("--kept", type=float, nargs="+", default=[], metavar="SHARE", help="shares of the entries")
    parser.add_argument("--bytes", type=float, nargs="+", default=[], metavar="SHARE", help="shares of the bytes")
    parser.add_argument("--limit", type=int, help="score only so many windows, from the first (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--json", type=Path, help="where scores go (default: runs/kvpress-WINDOWS.json)")
    return parser.parse_args(arguments)


def jobs_of(chosen: argparse.Namespace, window: Window) -> list[Job]:
    """What is to be scored, each once, in the order asked for.

    Raises:
        UserError: an unknown press, a share that is none, or one that leaves no entries.
    """
    asked = [Compression("kept", share) for share in chosen.kept] + [Compression("bytes", s) for s in chosen.bytes]
    asked = asked or [Compression("kept", share) for share in DEFAULT_KEPT]
    entries = {str(each): each.entries(window.context, window.continuation) for each in asked}
    jobs: dict[str, Job] = {}
    for name in chosen.presses:
        press = press_of(name, window.context)
        wanted = {"": window.context} if name == FULL else entries
        found = [Job(name, press, label, count) for label, count in wanted.items()]
        jobs |= {job.plan: job for job in found}
    return list(jobs.values())


def run(model: Any, directory: Path, windows: Sequence[Window], jobs: Sequence[Job], journal: Journal) -> list[Any]:
    """Score what the journal does not have yet; give the plans as they are written out."""
    from benchmarks.kvpress.scoring import measure, reference  # here, since torch takes seconds to import

    progress = Progress(len(windows) * len(jobs))
    rows: dict[str, list[Row]] = {job.plan: [] for job in jobs}
    for window in windows:
        key, full = digest(directory, window), None
        for job in jobs:
            row = journal.rows.get((key, job.plan, window.name))
            if row is None:
                full = full or reference(model, window)
                measured = measure(model, window, full, job.press, job.entries)
                about = (key, job.name, job.compression, window.name, window.document, full.nll)
                row = Row(*about, held_dtype=str(model.dtype).removeprefix("torch."), **asdict(measured))
                journal.add(row)
            rows[job.plan].append(row)
            progress.step(row)
    geometry = Geometry.of(model.config)
    return [plan_of(rows[job.plan], geometry, windows[0], job.press.frees_memory) for job in jobs]


class Progress:
    """A line for each window under a press, on stderr."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.monotonic()

    def step(self, row: Row) -> None:
        """Tell what came out, and how long the rest takes at this pace."""
        self.done += 1
        spent = time.monotonic() - self.started
        left = spent / self.done * (self.total - self.done)
        scores = f"dNLL {row.nll - row.nll_full:.4f}, KL {row.kl:.4f}, {row.seconds:.1f} s"
        print(
            f"{self.done}/{self.total}  {row.plan} on {row.window}: {scores}; "
            f"{spent / 60:.1f} min spent, {left / 60:.1f} min left",
            file=sys.stderr,
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Score, print a table and write the JSON.

    Raises:
        UserError: something given is wrong.
    """
    chosen = parse(arguments)
    for option in ("limit", "threads"):
        if (value := getattr(chosen, option)) is not None and value < 1:
            raise UserError(f"--{option} {value} is not at least 1; leave it out or give a higher number")
    windows = read_windows(chosen.windows)[: chosen.limit]
    jobs = jobs_of(chosen, windows[0])
    path = chosen.json or Path("runs") / f"kvpress-{chosen.windows.stem}.json"
    if path.suffix != ".json" or path.is_dir():
        raise UserError(f"--json {path} is no name of a .json file, beside which a .jsonl is kept; give one")
    os.environ |= QUIET
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzip tells at every use that it takes longer
    import torch

    torch.set_num_threads(chosen.threads)
    model = load(chosen.model)
    validate_for(windows, model.config)
    plans = run(model, chosen.model, windows, jobs, Journal(path.with_suffix(".jsonl")))
    write(path, plans, versions())
    print(table(plans))
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
