"""Heat maps of a plan as inline SVG: entries and bits per layer and KV head.

The page that shows it colours `.cell`, `.name` and `text` by its own style.
"""

import math
from collections.abc import Callable, Sequence
from html import escape

from baklava.plan.budget_plan import BudgetPlan

_WIDTH, _LEFT, _TOP = 720, 34, 24
_CELL_HEIGHT, _MAX_CELL_WIDTH = 13, 44
_SCALE_WIDTH = 56
_MIN_BITS = 2

_Rows = Sequence[Sequence[int]]


def plot_heat_map(plan: BudgetPlan) -> str:
    """Return three panels, for entries, bits of keys and bits of values: a row per layer, a column per KV head.

    More opaque cells have more. Layers with a sliding window, which have no budget, are blank.
    """
    max_tokens = max((tokens for row in plan.tokens for tokens in row), default=1)
    keys = [layer.key_bits if layer else () for layer in plan.layers]
    values = [layer.value_bits if layer else () for layer in plan.layers]
    max_bits = max((bits for row in (*keys, *values) for bits in row), default=_MIN_BITS)

    def opacity_of_tokens(tokens: int) -> float:
        return tokens / max_tokens

    def opacity_of_bits(bits: int) -> float:
        return math.log2(bits / _MIN_BITS) / (math.log2(max_bits / _MIN_BITS) or 1.0)

    token_scale = {round(max_tokens * quarter / 4) for quarter in range(5)}
    panels = (
        _panel("entries", plan.tokens, opacity_of_tokens, token_scale),
        _panel("bits of keys", keys, opacity_of_bits, {bits for row in keys for bits in row}),
        _panel("bits of values", values, opacity_of_bits, {bits for row in values for bits in row}),
    )
    parts = "".join(
        f'<g transform="translate({number * _WIDTH / len(panels):.1f} 0)">{panel}</g>'
        for number, panel in enumerate(panels)
    )
    height = max(_TOP + len(plan.layers) * _CELL_HEIGHT + 36, 150)
    if plan.eviction.scored and max_tokens > plan.context_length:
        note = (
            f"{max_tokens:,} entries are the {plan.context_length:,} tokens of the plan's context and the "
            f"{max_tokens - plan.context_length:,} that a head keeps until its next eviction"
        )
        parts += _text(_LEFT, height + 10, note)
        height += 16
    label = "entries and bits per layer and KV head"
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">{parts}</svg>'


def _panel(name: str, rows: _Rows, opacity: Callable[[int], float], scale: set[int]) -> str:
    heads = max((len(row) for row in rows), default=1) or 1
    width = min(_MAX_CELL_WIDTH, (_WIDTH / 3 - _LEFT - _SCALE_WIDTH) / heads)
    bottom, right = _TOP + len(rows) * _CELL_HEIGHT, _LEFT + heads * width
    parts = [_text(_LEFT, 12, name, kind="name"), _text((_LEFT + right) / 2, bottom + 30, "KV head", "middle")]
    for layer, row in enumerate(rows):
        y = _TOP + layer * _CELL_HEIGHT
        if layer % 5 == 0:
            parts.append(_text(_LEFT - 6, y + 10, str(layer), "end"))
        for head, value in enumerate(row):
            tooltip = f"layer {layer}, head {head}: {value}"
            parts.append(_cell(_LEFT + head * width, y, width, opacity(value), tooltip))
    for head in range(0, heads, max(1, math.ceil(18 / width))):
        parts.append(_text(_LEFT + (head + 0.5) * width, bottom + 14, str(head), "middle"))
    for step, value in enumerate(sorted(scale, reverse=True)):
        parts.append(_cell(right + 12, _TOP + step * 16, 14, opacity(value), ""))
        parts.append(_text(right + 30, _TOP + step * 16 + 10, f"{value:,}"))
    return "".join(parts)


def _cell(x: float, y: float, width: float, opacity: float, tooltip: str) -> str:
    title = f"<title>{escape(tooltip)}</title>" if tooltip else ""
    box = f'x="{x:.1f}" y="{y:.1f}" width="{max(1.0, width - 1):.1f}" height="{_CELL_HEIGHT - 1}"'
    return f'<rect class="cell" {box} fill-opacity="{0.06 + 0.94 * opacity:.3f}">{title}</rect>'


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(words)}</text>'
