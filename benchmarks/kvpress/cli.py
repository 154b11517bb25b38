"""Score kvpress's presses on token windows, against the full cache of the same model.

Examples:
  make peers WINDOWS=windows.json
  make peers WINDOWS=windows.json ARGS="--presses snapkv kvzip --kept 0.3 0.125 --json runs/kvpress.json"
  make peers WINDOWS=windows.json MODEL=path/to/model ARGS="--bytes 0.3"
  benchmarks/kvpress/.venv/bin/python -m benchmarks.kvpress.cli --model path/to/model --windows windows.json

--kept is the share of the context's entries that a press keeps. --bytes is the share of the full cache's bytes at the
end of the window; kvpress evicts nothing of the continuation, so its entries leave fewer for the context. Finished
windows go to a .jsonl next to the JSON, and the same command continues from there after it was interrupted.
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

from benchmarks.kvpress.loading import (
    UserError,
    Window,
    digest,
    load,
    read_windows,
    run_cli,
    validate_windows,
    versions,
)
from benchmarks.kvpress.presses import FULL, PRESSES, Press, find_press
from benchmarks.kvpress.results import Compression, Geometry, Journal, Row, plan_name, summarize_plan, table, write

OFFLINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
DEFAULT_KEPT_SHARES = (0.3, 0.125)


@dataclass(frozen=True)
class Job:
    """A press and its compression; `entries` of the context are kept, as a mean per KV head."""

    name: str
    press: Press
    compression: str
    entries: int

    @property
    def plan(self) -> str:
        """The plan's name in the output."""
        return plan_name(self.name, self.compression)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
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
    parser.add_argument("--limit", type=int, help="score only the first windows (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--json", type=Path, help="file of scores (default: runs/kvpress-WINDOWS.json)")
    return parser.parse_args(argv)


def make_jobs(args: argparse.Namespace, window: Window) -> list[Job]:
    """Return each press at each compression, once, in the order of the command line.

    Raises:
        UserError: a press is unknown, a value is not a share, or a share leaves no entries.
    """
    compressions = [Compression("kept", share) for share in args.kept]
    compressions += [Compression("bytes", share) for share in args.bytes]
    compressions = compressions or [Compression("kept", share) for share in DEFAULT_KEPT_SHARES]
    entries = {
        str(compression): compression.entries(window.context, window.continuation) for compression in compressions
    }
    jobs: dict[str, Job] = {}
    for name in args.presses:
        press = find_press(name, window.context)
        for label, count in ({"": window.context} if name == FULL else entries).items():
            job = Job(name, press, label, count)
            jobs[job.plan] = job
    return list(jobs.values())


def run(model: Any, directory: Path, windows: Sequence[Window], jobs: Sequence[Job], journal: Journal) -> list[Any]:
    """Score what the journal does not have yet; return the plans' entries in the output."""
    from benchmarks.kvpress.scoring import reference, score_press  # imported here, since torch takes seconds

    progress = Progress(len(windows) * len(jobs))
    rows: dict[str, list[Row]] = {job.plan: [] for job in jobs}
    for window in windows:
        key, full = digest(directory, window), None
        for job in jobs:
            row = journal.rows.get((key, job.plan, window.name))
            if row is None:
                full = full or reference(model, window)
                scores = score_press(model, window, full, job.press, job.entries)
                identity = (key, job.name, job.compression, window.name, window.document, full.nll)
                row = Row(*identity, storage_dtype=str(model.dtype).removeprefix("torch."), **asdict(scores))
                journal.add(row)
            rows[job.plan].append(row)
            progress.step(row)
    geometry = Geometry.from_config(model.config)
    return [summarize_plan(rows[job.plan], geometry, windows[0], job.press.frees_memory) for job in jobs]


class Progress:
    """Progress on stderr, one line per window and press."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.monotonic()

    def step(self, row: Row) -> None:
        """Print the scores, and the time left at this pace."""
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


def main(argv: Sequence[str] | None = None) -> None:
    """Score, print a table and write the JSON.

    Raises:
        UserError: an argument, a file or the model is not valid.
    """
    args = parse_args(argv)
    for option in ("limit", "threads"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise UserError(f"--{option} {value} is below 1; leave it out or give a larger number")
    windows = read_windows(args.windows)[: args.limit]
    jobs = make_jobs(args, windows[0])
    path = args.json or Path("runs") / f"kvpress-{args.windows.stem}.json"
    if path.suffix != ".json" or path.is_dir():
        raise UserError(
            f"--json {path} is not the name of a .json file; name one, and the journal goes to a .jsonl next to it"
        )
    os.environ |= OFFLINE_ENVIRONMENT
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzip warns at every use that it is slow
    import torch

    torch.set_num_threads(args.threads)
    model = load(args.model)
    validate_windows(windows, model.config)
    plans = run(model, args.model, windows, jobs, Journal(path.with_suffix(".jsonl")))
    write(path, plans, versions())
    print(table(plans))
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
