"""The study as a picture: loss over bytes, a line a method, named at its end, in the light and dark of its reader."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.fidelity.markdown import number, percent
from benchmarks.fidelity.results import TOGETHER
from tuning.reporting.svg import hline, text

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 900, 560, 64, 64, 52
NAMES = 640  # where the names begin
APART = 17  # pixels between two names
LEAST = 1e-3
"""Nats per token at the foot of the scale: what rounding and sixteen bits cost is below."""

LEVELS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
GROUPS = {"ours": "ours", "packed": "others in 4 bits", "published": "as published, 16 bits (dashed: sinks + recent)"}

STYLE = """
svg { --page: #fdfcfa; --ink: #22201d; --soft: #6d675f; --line: #e4dfd7;
  --ours: #b4490a; --packed: #2f6f8f; --published: #a39a8d; }
@media (prefers-color-scheme: dark) {
svg { --page: #1a1917; --ink: #ece8e1; --soft: #a39c91; --line: #38352f;
  --ours: #f39a55; --packed: #6fb6d8; --published: #857d72; } }
rect { fill: var(--page); }
text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--soft); }
.title text { font-size: 15px; font-weight: 600; fill: var(--ink); }
.grid { stroke: var(--line); }
polyline { fill: none; stroke: var(--colour); stroke-width: 1.5; stroke-linejoin: round; }
circle { fill: var(--colour); }
.to { fill: none; stroke: var(--colour); stroke-width: .75; opacity: .55; }
.band { fill: var(--colour); opacity: .16; }
.ours { --colour: var(--ours); } .packed { --colour: var(--packed); } .published { --colour: var(--published); }
.ours polyline { stroke-width: 4; } .ours text { font-weight: 700; fill: var(--ours); }
.packed polyline { stroke-width: 2; } .packed text { fill: var(--packed); }
.ring polyline { stroke-dasharray: 5 3; }
"""

Scale = Callable[[float], float]
Line = tuple[Mapping[str, Any], list[Mapping[str, Any]]]
"""A method, and its rows from the most bytes on."""


def picture(figures: Mapping[str, Any]) -> str:
    """The SVG, a file of its own."""
    lines = _lines(figures)
    x, y = _scales([row for _, rows in lines for row in rows])
    places = _apart([y(rows[-1]["dnll"][0]) for _, rows in lines])
    drawn = sorted(zip(lines, places, strict=True), key=lambda pair: list(GROUPS)[::-1].index(pair[0][0]["group"]))
    parts = [*_frame(figures, x, y), *(_drawn(line, place, x, y) for line, place in drawn)]
    label = "loss over the full cache against bytes, method by method"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    inside = "\n".join(parts)
    return f'{head}<style>{STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}"/>\n{inside}\n</svg>\n'


def _lines(figures: Mapping[str, Any]) -> list[Line]:
    """The methods that compete and have a plan, from the one that ends with the most loss on."""
    found = []
    for method in figures["methods"]:
        rows = [row for row in figures["rows"] if (row["method"], row["corpus"]) == (method["name"], TOGETHER)]
        if rows and method["group"] in GROUPS:
            found.append((method, sorted(rows, key=lambda row: (-row["ratio"], -row["budget"]))))
    return sorted(found, key=lambda line: -line[1][-1]["dnll"][0])


def _scales(rows: Sequence[Mapping[str, Any]]) -> tuple[Scale, Scale]:
    sizes = [row["ratio"] for row in rows]
    most = max(2 * LEAST, *(row["dnll"][0] for row in rows)) * 1.15
    first, last = math.log(max(*sizes, min(sizes) * 2)), math.log(min(sizes))

    def x(size: float) -> float:
        return LEFT + (math.log(size) - first) / (last - first) * (NAMES - 40 - LEFT)

    def y(loss: float) -> float:
        share = math.log(max(loss, LEAST) / LEAST) / math.log(most / LEAST)
        return HEIGHT - BOTTOM - min(1.0, share) * (HEIGHT - BOTTOM - TOP)

    return x, y


def _apart(places: Sequence[float]) -> list[float]:
    """Places from the top down, moved as little as keeps them `APART` and inside the picture."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + APART) if moved else place)
    low = HEIGHT - BOTTOM + 8.0
    for index in reversed(range(len(moved))):
        moved[index] = low = min(moved[index], low)
        low -= APART
    return moved


def _frame(figures: Mapping[str, Any], x: Scale, y: Scale) -> list[str]:
    together = next(corpus for corpus in figures["corpora"] if corpus["name"] == TOGETHER)
    titled = text(16, 26, "What a plan loses, over the bytes that it keeps")
    kind = "unseen" if figures["split"] == "test" else figures["split"]
    over = f"{together['n']} windows of {together['documents']} {kind} documents"
    said = f"nats per token over the full cache, mean of {over}"
    levels = [hline(y(loss), LEFT, NAMES - 40, f"{'≤ ' * (loss == LEAST)}{loss:g}") for loss in LEVELS if y(loss) > TOP]
    ticks = [
        f'<line class="grid" x1="{x(budget):.1f}" x2="{x(budget):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        + text(x(budget), HEIGHT - BOTTOM + 18, percent(budget), "middle")
        for budget in sorted({row["budget"] for row in figures["rows"]})
    ]
    axis = text(
        (LEFT + NAMES - 40) / 2, HEIGHT - 10, "bytes, of the full cache in 16 bits: fewer to the right", "middle"
    )
    return [f'<g class="title">{titled}</g>', text(16, 46, said), *levels, *ticks, axis, *_groups()]


def _groups() -> list[str]:
    parts, start = [], 440.0
    for group, said in GROUPS.items():
        parts.append(f'<g class="{group}">{text(start, 26, said)}</g>')
        start += 6.4 * len(said) + 22
    return parts


def _drawn(line: Line, place: float, x: Scale, y: Scale) -> str:
    method, rows = line
    points = [(x(row["ratio"]), y(row["dnll"][0])) for row in rows]
    path = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
    dots = "".join(_dot(method, row, point) for row, point in zip(rows, points, strict=True))
    across, down = points[-1]
    bent = f"M{across + 6:.1f} {down:.1f} L{NAMES - 26} {place:.1f} H{NAMES - 6}"
    to = f'<path class="to" d="{bent}"/>'
    name = text(NAMES, place + 4, method["label"])
    ring = " ring" if "+" not in method["name"] and method["group"] != "ours" else ""
    band = _band(rows, x, y) if method["group"] == "ours" else ""
    return f'<g class="{method["group"]}{ring}">{band}<polyline points="{path}"/>{dots}{to}{name}</g>'


def _dot(method: Mapping[str, Any], row: Mapping[str, Any], point: tuple[float, float]) -> str:
    told = escape(f"{method['label']}, {row['ratio']:.1%} of the bytes: {number(row['dnll'][0])}")
    radius = 5 if method["group"] == "ours" else 2.5
    return f'<circle cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="{radius}"><title>{told}</title></circle>'


def _band(rows: Sequence[Mapping[str, Any]], x: Scale, y: Scale) -> str:
    """The intervals of all means."""
    known = [row for row in rows if row["dnll"][1] is not None]
    edges = [(row["ratio"], row["dnll"][1]) for row in known] + [(row["ratio"], row["dnll"][2]) for row in known[::-1]]
    return f'<polygon class="band" points="{" ".join(f"{x(size):.1f},{y(loss):.1f}" for size, loss in edges)}"/>'
