"""The chart of the winner against the heuristics: how many times its loss each of them has, with intervals."""

import math
from collections.abc import Sequence

from baklava.evaluation.bootstrap import Interval
from tuning.reporting.svg import Scale, diamond, dot, log_values, logarithmic, svg, text, upright
from tuning.selection.ablation import format_ratio
from tuning.selection.result import SearchResult
from tuning.selection.validation import log_kl_ratio

WIDTH, LEFT, RIGHT, TOP, ROW, BOTTOM = 720, 292, 24, 10, 26, 44
LEAST, MOST = 0.25, 64.0
"""Ratios where the scale ends, whatever an interval of few documents says."""


def rivals_chart(outcome: SearchResult) -> str:
    """A row per plan that is not the winner: its KL over the winner's on the same windows, the least first."""
    rows = _rows(outcome)
    if not rows:
        return "<p>Nothing else could be scored.</p>"
    ends = [math.exp(value) for _, found, _ in rows for value in (found.mean, found.low, found.high) if value == value]
    low, high = max(LEAST, min(0.8, *ends)), min(MOST, max(1.5, *ends))
    x, bottom = logarithmic(low, high, LEFT, WIDTH - RIGHT), TOP + ROW * len(rows)
    grid = [upright(x(mark), TOP, bottom, f"{mark:g} ×") for mark in log_values(low, high) if mark != 1]
    grid.append(upright(x(1), TOP, bottom, "1", "one"))
    parts = [part for number, row in enumerate(rows) for part in _row(*row, TOP + ROW * (number + 0.5), x, low, high)]
    axis = text(
        (LEFT + WIDTH - RIGHT) / 2, bottom + 36, "KL over the winner's: right of 1 the winner is better", "middle"
    )
    return svg(WIDTH, bottom + BOTTOM, "KL over the winner's, plan by plan", [*grid, *parts, axis])


def _rows(outcome: SearchResult) -> list[tuple[str, Interval, bool]]:
    """Name, log of the ratio, whether it is a trial; where trials chose their sizes, only heuristics have its own."""
    winner, comparable = outcome.winner, not outcome.settings.goal.samples_budget
    rows = [
        (entry.candidate.name, log_kl_ratio([entry], winner), entry.candidate.trial is not None)
        for entry in outcome.ranking
        if entry is not winner and (comparable or entry.candidate.trial is None)
    ]
    names = {name for name, _, _ in rows}
    rows += [(rival.name, rival.log_kl_ratio, False) for rival in outcome.ablations if rival.name not in names]
    return sorted(rows, key=lambda row: row[1].mean)


def _row(name: str, found: Interval, trial: bool, y: float, x: Scale, low: float, high: float) -> Sequence[str]:
    def place(value: float) -> float:
        return x(min(high, max(low, math.exp(value))))

    mark = (dot if trial else diamond)(
        "finished" if trial else "heuristic", place(found.mean), y, 5, f"{name}: {format_ratio(found)}"
    )
    short = name if len(name) <= 46 else f"{name[:45]}…"
    return [text(LEFT - 12, y + 4, short, "end", "name"), *_bar(found, y, place), mark]


def _bar(found: Interval, y: float, place: Scale) -> list[str]:
    if math.isnan(found.low):
        return []
    at = f'x1="{place(found.low):.1f}" x2="{place(found.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
    return [f'<line class="spread" {at}/>']
