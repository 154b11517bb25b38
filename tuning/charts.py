"""Charts as inline SVG, coloured by the page's CSS variables so that they follow its light and dark themes."""

from collections.abc import Sequence
from html import escape
from itertools import accumulate

from baklava.plan import BudgetPlan
from tuning.goal import Goal
from tuning.svg import level, svg, text
from tuning.trials import TrialRecord

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 300, 62, 16, 14, 40
CELL_HEIGHT, MOST_CELL_WIDTH = 13, 56
CROWDED = 4.0
"""The scale ends at this many times the median, so that one bad trial does not flatten all others."""


def heat_map(plan: BudgetPlan) -> str:
    """Entries per layer (down) and KV head (across); the darker against the page, the more."""
    rows, heads = plan.tokens, plan.geometry.kv_heads
    most = max((max(row) for row in rows if row), default=1)
    wide = min(MOST_CELL_WIDTH, (WIDTH - LEFT) // heads)
    cells = [
        _cell(
            LEFT + head * wide,
            layer * CELL_HEIGHT,
            wide,
            tokens / most,
            f"layer {layer}, head {head}: {tokens} entries",
        )
        for layer, row in enumerate(rows)
        for head, tokens in enumerate(row)
    ]
    labels = [text(LEFT - 8, layer * CELL_HEIGHT + 10, str(layer), "end") for layer in range(0, len(rows), 5)]
    bottom = len(rows) * CELL_HEIGHT
    every = max(1, heads // 16)
    labels += [text(LEFT + h * wide + wide // 2, bottom + 14, str(h), "middle") for h in range(0, heads, every)]
    scale = _scale(LEFT + heads * wide + 24, most)
    axes = [text(LEFT + heads * wide // 2, bottom + 30, "KV head", "middle"), text(0, 10, "layer", "start")]
    return svg(WIDTH, max(bottom + 36, 150), "entries per layer and KV head", [*cells, *labels, *axes, *scale])


def trial_chart(records: Sequence[TrialRecord], goal: Goal) -> str:
    """The objective of every trial in the order they ended, and the best so far as a line."""
    scored = [record for record in records if record.metrics]
    values = [goal.value(record.metrics) for record in scored]
    if not values:
        return "<p>No trial could be scored.</p>"
    low, high = min(values), min(max(values), CROWDED * sorted(values)[len(values) // 2])
    place = _Place(low - 0.05 * (high - low), high + 0.05 * (high - low) or low + 1e-9, max(2, len(records)))
    dots = [_dot(record, value, place, goal) for record, value in zip(scored, values, strict=True)]
    failed = [_cross(record, place) for record in records if record.status == "failed"]
    marks = [low + step * (high - low) / 4 for step in range(5)]
    ticks = [level(place.y(value), LEFT, WIDTH - RIGHT, f"{value:.3g}") for value in marks]
    axes = [text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "trial", "middle"), *_trial_ticks(place)]
    return svg(
        WIDTH, HEIGHT, f"{goal.objective} by trial", [*ticks, *axes, _best_line(scored, goal, place), *dots, *failed]
    )


class _Place:
    """Where a trial and a value are on the chart; values above the scale sit at its top."""

    def __init__(self, low: float, high: float, trials: int) -> None:
        self.low, self.high, self.trials = low, max(high, low + 1e-12), trials

    def x(self, trial: int) -> float:
        return LEFT + (trial - 0.5) / self.trials * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (min(value, self.high) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _best_line(records: Sequence[TrialRecord], goal: Goal, place: _Place) -> str:
    complete = [record for record in records if record.status == "finished"]
    best = list(accumulate((goal.value(record.metrics) for record in complete), min))
    if not best:
        return ""
    steps = [f"M{place.x(complete[0].trial):.1f},{place.y(best[0]):.1f}"]
    steps += [f"H{place.x(r.trial):.1f}V{place.y(b):.1f}" for r, b in zip(complete[1:], best[1:], strict=True)]
    return f'<path class="best" d="{"".join(steps)}H{WIDTH - RIGHT}"/>'


def _dot(record: TrialRecord, value: float, place: _Place, goal: Goal) -> str:
    above = ", above the scale" if value > place.high else ""
    told = f"trial {record.trial}, {record.status}: {goal.told(record.metrics)}{above}"
    at = f'cx="{place.x(record.trial):.1f}" cy="{place.y(value):.1f}"'
    return f'<circle class="{record.status}" {at} r="4.5"><title>{escape(told)}</title></circle>'


def _cross(record: TrialRecord, place: _Place) -> str:
    told = f"trial {record.trial} failed: {record.error}"
    return f'<text class="cross" x="{place.x(record.trial):.1f}" y="{TOP}">&#215;<title>{escape(told)}</title></text>'


def _trial_ticks(place: _Place) -> list[str]:
    every = max(1, -(-place.trials // 12))
    return [text(place.x(t), HEIGHT - BOTTOM + 18, str(t), "middle") for t in range(1, place.trials + 1, every)]


def _scale(x: float, most: int) -> list[str]:
    steps = [_cell(x, 10 + step * 12, 16, 1 - step / 8, "") for step in range(9)]
    return [*steps, text(x + 24, 20, f"{most} entries", "start"), text(x + 24, 116, "0", "start")]


def _cell(x: float, y: float, width: float, share: float, told: str) -> str:
    tip = f"<title>{escape(told)}</title>" if told else ""
    box = f'x="{x}" y="{y}" width="{width - 1}" height="{CELL_HEIGHT - 1}"'
    return f'<rect class="cell" {box} fill-opacity="{0.04 + 0.96 * share:.3f}">{tip}</rect>'
