"""What was measured of the search as Markdown: a table for the README, and docs/scale.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.markdown_page import table_row

NAME, SCALE = "search", "scale"
"""Names of the markers in README and docs/scale.md."""

TRIAL_SECONDS = (1, 4, 15, 60, 240)
"""Times of a trial on one GPU that docs/scale.md tells the reach for."""

Figures = Mapping[str, Any]


def table(figures: Figures) -> str:
    """One row per thing that was measured, with what was aimed at."""
    rows = [["the search", "measured", "aim"], ["---"] * 3]
    for part, tell in (("overhead", _overhead), ("naive", _naive), ("replicas", _replicas)):
        rows += tell(figures[part]) if part in figures else []
    parts = ["\n".join(map(table_row, rows))] if len(rows) > 2 else []
    return "\n\n".join([*parts, *([_dispatched(figures["dispatch"])] if "dispatch" in figures else [])])


def scale(figures: Figures) -> str:
    """How many GPUs one head node keeps busy, by the time of a trial; a figure of the dispatch benchmark alone.

    It is the slowest rate with several replicas that counts: a lone one may be served faster.
    """
    slowest = min(figures["dispatch"][1:] or figures["dispatch"], key=lambda row: row["per_second"])
    rate = slowest["per_second"]
    cpus = figures["machine"]["cpus"]
    said = (
        f"At its slowest, with {slowest['replicas']} replicas that sleep, the head ({cpus} CPUs, on which the replicas "
        f"ran as well) ended {rate:.2f} trials a second. A replica that takes T seconds for a trial asks for one every "
        f"T seconds, so the head keeps {rate:.2f} x T of them busy:"
    )
    rows = [["seconds of a trial on one replica", *map(str, TRIAL_SECONDS)], ["---"] * (len(TRIAL_SECONDS) + 1)]
    rows.append(["replicas that one head keeps busy", *(f"{rate * seconds:.0f}" for seconds in TRIAL_SECONDS)])
    return "\n\n".join([_dispatched(figures["dispatch"]), said, "\n".join(map(table_row, rows))])


def _overhead(found: Figures) -> list[list[str]]:
    trials = f"{found['trials']} trials on {found['replicas']} replicas, over scoring seconds / replicas"
    return [
        [f"wall time of {trials}", f"{found['overhead']:.2f} ×", "≤ 1.25"],
        ["script start to the first trial, model and profile cached", f"{found['first_trial_starts']:.0f} s", "≤ 20 s"],
        ["the same, until it has ended", f"{found['first_trial_ends']:.0f} s", ""],
    ]


def _naive(found: Figures) -> list[list[str]]:
    rows = []
    for way, told in (("stepped", "token by token"), ("at_once", "continuations in one forward")):
        figures = found[way]
        apart = f"scores at most {figures['nll_apart']:.1g} nats apart"
        named = f"trials per hour over a process per trial, {told}, its full cache for the KL not counted ({apart})"
        rows.append([named, f"{figures['times']:.1f} ×", "≥ 8 ×"])
        rows.append(["the same per scored window, without early stopping", f"{figures['times_per_window']:.1f} ×", ""])
    return rows


def _replicas(found: Figures) -> list[list[str]]:
    return [[f"two replicas of {found['threads']} thread over one", f"{found['times']:.2f} ×", "≥ 1.7 ×"]]


def _dispatched(rows: Sequence[Figures]) -> str:
    lines = [
        ["replicas that sleep instead of scoring", *(str(row["replicas"]) for row in rows)],
        ["---"] * (len(rows) + 1),
        ["trials per second", *(f"{row['per_second']:.2f}" for row in rows)],
        ["the sleeps alone would allow", *(f"{row['ideal']:.0f}" for row in rows)],
    ]
    return "\n".join(map(table_row, lines))
