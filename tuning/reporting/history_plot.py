"""The chart of trials: what each came to in its turn, and the best so far."""

from collections.abc import Sequence
from html import escape
from itertools import accumulate

from tuning.reporting.svg import Scale, dot, level, linear, log_values, logarithmic, svg, text
from tuning.study.objective import Goal
from tuning.study.trial import TrialRecord, finished_trials

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 300, 62, 16, 24, 40
MARGIN = 1.08
"""Room above and below the values, as a ratio."""


def trial_chart(records: Sequence[TrialRecord], goal: Goal) -> str:
    """The objective of every trial in the order they ended, in logarithms, and the best so far as a line."""
    scored = [record for record in records if record.metrics]
    values = [goal.objective_value(record.metrics) for record in scored]
    if not values:
        return "<p>No trial could be scored.</p>"
    x = linear(1, max(2, len(records)), LEFT + 14, WIDTH - RIGHT - 14)
    y = logarithmic(min(values) / MARGIN, max(values) * MARGIN, HEIGHT - BOTTOM, TOP)
    grid = [level(y(mark), LEFT, WIDTH - RIGHT, f"{mark:.3g}") for mark in log_values(min(values), max(values))]
    axes = [text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "trial", "middle"), text(0, 12, goal.value_name)]
    ticks = [text(x(t), HEIGHT - BOTTOM + 18, str(t), "middle") for t in _numbered(max(2, len(records)))]
    dots = [
        dot(
            record.status,
            x(record.trial),
            y(value),
            4.5,
            f"trial {record.trial}, {record.status}: {_told(record, goal)}",
        )
        for record, value in zip(scored, values, strict=True)
    ]
    failed = [_cross(record, x) for record in records if record.status == "failed"]
    best = _best_line(scored, goal, x, y)
    return svg(WIDTH, HEIGHT, f"{goal.value_name} by trial", [*grid, *axes, *ticks, best, *dots, *failed])


def _told(record: TrialRecord, goal: Goal) -> str:
    return goal.format_metrics(record.metrics) + (f", refined from trial {record.parent_trial}" if record.parent_trial else "")


def _best_line(records: Sequence[TrialRecord], goal: Goal, x: Scale, y: Scale) -> str:
    complete = [] if goal.front else finished_trials(records)  # of many sizes the best is only the largest
    best = list(accumulate((goal.objective_value(record.metrics) for record in complete), min))
    if not best:
        return ""
    steps = [f"M{x(complete[0].trial):.1f},{y(best[0]):.1f}"]
    steps += [f"H{x(r.trial):.1f}V{y(b):.1f}" for r, b in zip(complete[1:], best[1:], strict=True)]
    return f'<path class="best" d="{"".join(steps)}H{WIDTH - RIGHT}"/>'


def _cross(record: TrialRecord, x: Scale) -> str:
    # What Ray says may be pages, with colours, which no XML holds.
    told = f"trial {record.trial} failed: {''.join(filter(str.isprintable, record.error or ''))[:300]}"
    return f'<text class="cross" x="{x(record.trial):.1f}" y="{TOP}">&#215;<title>{escape(told)}</title></text>'


def _numbered(trials: int) -> range:
    return range(1, trials + 1, max(1, -(-trials // 12)))
