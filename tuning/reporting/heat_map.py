"""The heat maps of a plan: entries and bits per layer and KV head."""

import math
from collections.abc import Callable, Sequence
from html import escape

from baklava.plan.budget_plan import BudgetPlan
from tuning.reporting.svg import group, svg, text

WIDTH, LEFT, TOP = 720, 34, 24
CELL_HEIGHT, MOST_CELL_WIDTH = 13, 44
SCALE_WIDTH = 56
LEAST_BITS = 2

Rows = Sequence[Sequence[int]]


def heat_map(plan: BudgetPlan) -> str:
    """Entries, bits of keys and bits of values: layers down, KV heads across; the darker against the page, the more."""
    most = max((tokens for row in plan.tokens for tokens in row), default=1)
    keys = [layer.key_bits if layer else () for layer in plan.layers]
    values = [layer.value_bits if layer else () for layer in plan.layers]
    panels = [
        _panel("entries", plan.tokens, lambda tokens: tokens / most, _steps(most)),
        _panel("bits of keys", keys, _share_of_bits([*keys, *values]), _distinct(keys)),
        _panel("bits of values", values, _share_of_bits([*keys, *values]), _distinct(values)),
    ]
    wide = WIDTH / len(panels)
    moved = [group(number * wide, 0, panel) for number, panel in enumerate(panels)]
    height = max(TOP + len(plan.layers) * CELL_HEIGHT + 36, 150)
    return svg(WIDTH, height, "entries and bits per layer and KV head", moved)


def _panel(name: str, rows: Rows, share: Callable[[int], float], marks: Sequence[int]) -> list[str]:
    heads = max((len(row) for row in rows), default=1) or 1
    wide = min(MOST_CELL_WIDTH, (WIDTH / 3 - LEFT - SCALE_WIDTH) / heads)
    cells = [
        _cell(LEFT + head * wide, TOP + layer * CELL_HEIGHT, wide, share(value), f"layer {layer}, head {head}: {value}")
        for layer, row in enumerate(rows)
        for head, value in enumerate(row)
    ]
    bottom, right = TOP + len(rows) * CELL_HEIGHT, LEFT + heads * wide
    layers = [text(LEFT - 6, TOP + layer * CELL_HEIGHT + 10, str(layer), "end") for layer in range(0, len(rows), 5)]
    every = max(1, math.ceil(18 / wide))
    across = [text(LEFT + (h + 0.5) * wide, bottom + 14, str(h), "middle") for h in range(0, heads, every)]
    names = [text(LEFT, 12, name, kind="name"), text((LEFT + right) / 2, bottom + 30, "KV head", "middle")]
    return [*cells, *layers, *across, *names, *_scale(right + 12, marks, share)]


def _scale(x: float, marks: Sequence[int], share: Callable[[int], float]) -> list[str]:
    """Which value has which shade."""
    boxes = [_cell(x, TOP + step * 16, 14, share(mark), "") for step, mark in enumerate(marks)]
    return [*boxes, *(text(x + 18, TOP + step * 16 + 10, str(mark)) for step, mark in enumerate(marks))]


def _steps(most: int) -> list[int]:
    return sorted({round(most * step / 4) for step in range(5)}, reverse=True)


def _distinct(rows: Rows) -> list[int]:
    return sorted({bits for row in rows for bits in row}, reverse=True)


def _share_of_bits(rows: Rows) -> Callable[[int], float]:
    """The fewest bits that there are to store in are light and the plan's most dark, by their logarithms."""
    span = math.log2(max(_distinct(rows), default=LEAST_BITS) / LEAST_BITS) or 1.0
    return lambda bits: math.log2(bits / LEAST_BITS) / span


def _cell(x: float, y: float, width: float, share: float, told: str) -> str:
    tip = f"<title>{escape(told)}</title>" if told else ""
    box = f'x="{x:.1f}" y="{y:.1f}" width="{max(1.0, width - 1):.1f}" height="{CELL_HEIGHT - 1}"'
    return f'<rect class="cell" {box} fill-opacity="{0.06 + 0.94 * share:.3f}">{tip}</rect>'
