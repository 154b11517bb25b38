"""The results of the search benchmark as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.markdown_page import markdown_table

SECTION, SCALE_SECTION = "search", "scale"
"""Names of the page's markers."""

SCALE_TRIAL_SECONDS = (1, 4, 15, 60, 240)
"""Seconds of a trial on one worker for which the scale section extrapolates."""

Results = Mapping[str, Any]


def format_tables(results: Results) -> str:
    """Return a table of measurements with their aims, and one of the dispatch."""
    rows = []
    if "overhead" in results:
        rows += _overhead_rows(results["overhead"])
    if "baseline" in results:
        rows += _baseline_rows(results["baseline"])
    if "scaling" in results:
        scaling = results["scaling"]
        label = f"windows per second of two workers with {scaling['threads']} thread, over one"
        rows.append([label, f"{scaling['speedup']:.2f} ×", "≥ 1.7 ×"])
    tables = [markdown_table(["the search", "measured", "aim"], rows)] if rows else []
    if "dispatch" in results:
        tables.append(_format_dispatch(results["dispatch"]))
    return "\n\n".join(tables)


def format_scale(results: Results) -> str:
    """Return how many workers one head node keeps busy, by the time of a trial.

    The rate is the lowest one with several workers, since a single worker may be served faster.
    """
    slowest = min(results["dispatch"][1:] or results["dispatch"], key=lambda row: row["trials_per_second"])
    rate = slowest["trials_per_second"]
    cpus = results["machine"]["cpus"]
    explanation = (
        f"At its slowest, with {slowest['workers']} sleeping workers, the head finished {rate:.2f} trials per second "
        f"(on {cpus} CPUs, which it shared with the workers). A worker that takes T seconds for a trial needs a new "
        f"one every T seconds, so the head keeps {rate:.2f} × T workers busy:"
    )
    reach = markdown_table(
        ["seconds of a trial on one worker", *map(str, SCALE_TRIAL_SECONDS)],
        [["workers that one head keeps busy", *(f"{rate * seconds:.0f}" for seconds in SCALE_TRIAL_SECONDS)]],
    )
    return "\n\n".join([_format_dispatch(results["dispatch"]), explanation, reach])


def _overhead_rows(overhead: Results) -> list[list[str]]:
    trials = f"{overhead['trials']} trials on {overhead['workers']} workers"
    return [
        [f"wall time of {trials}, over scoring time / workers", f"{overhead['overhead']:.2f} ×", "≤ 1.25 ×"],
        [
            "start of the script to first trial, model and profile cached",
            f"{overhead['first_trial_starts']:.0f} s",
            "≤ 20 s",
        ],
        ["start of the script to end of first trial", f"{overhead['first_trial_ends']:.0f} s", ""],
    ]


def _baseline_rows(baseline: Results) -> list[list[str]]:
    rows = []
    for mode, description in (("token_by_token", "token by token"), ("one_forward", "continuations in one forward")):
        result = baseline[mode]
        difference = f"scores differ by at most {result['max_nll_difference']:.1g} nats"
        label = f"trials per hour over one process per trial, {description}, full-cache pass not counted ({difference})"
        rows.append([label, f"{result['speedup']:.1f} ×", "≥ 8 ×"])
        rows.append(["the same per scored window, without pruning", f"{result['speedup_per_window']:.1f} ×", ""])
    return rows


def _format_dispatch(rows: Sequence[Results]) -> str:
    return markdown_table(
        ["workers that sleep instead of scoring", *(str(row["workers"]) for row in rows)],
        [
            ["trials per second", *(f"{row['trials_per_second']:.2f}" for row in rows)],
            ["upper bound from the sleeps alone", *(f"{row['ideal_trials_per_second']:.0f}" for row in rows)],
        ],
    )
