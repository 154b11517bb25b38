"""The chart of a front: loss over bytes, both in logarithms."""

import math
from collections.abc import Callable, Sequence
from html import escape

from tuning.goal import NAMES, Goal
from tuning.svg import level, svg, text
from tuning.trials import TrialRecord, finished
from tuning.validate import Validated, size_of

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 340, 62, 24, 20, 44
STEPS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 1.0)
"""Shares of bytes that are worth a tick."""

Scale = Callable[[float], float]


def front_chart(front: Sequence[Validated], winner: Validated, trials: Sequence[TrialRecord], goal: Goal) -> str:
    """The front on validation windows as a line, the chosen point marked, and all finished trials behind it."""
    tried = finished(trials)
    points = [(size_of(entry), goal.loss(entry.metrics)) for entry in front]
    behind = [(record.metrics["ratio"], goal.loss(record.metrics)) for record in tried]
    sizes, losses = zip(*points, *behind, strict=True)
    x = _scale(min(sizes), max(sizes), LEFT + 10, WIDTH - RIGHT - 10)
    y = _scale(min(losses), max(losses), HEIGHT - BOTTOM - 8, TOP)
    name = NAMES[goal.objective]
    ticks = [text(x(s), HEIGHT - BOTTOM + 18, f"{s:.0%}", "middle") for s in STEPS if min(sizes) <= s <= max(sizes)]
    marks = [level(y(mark), LEFT, WIDTH - RIGHT, f"{mark:.2g}") for mark in _marks(min(losses), max(losses))]
    axes = [text((LEFT + WIDTH) / 2, HEIGHT - 6, "share of the full cache's bytes", "middle"), text(0, 10, name)]
    dots = [_dot("pruned", 3, x(s), y(v), f"trial {r.trial}") for r, (s, v) in zip(tried, behind, strict=True)]
    line = "L".join(f"{x(size):.1f},{y(loss):.1f}" for size, loss in points)
    path = f'<path class="best" d="M{line}"/>'
    dots += [
        _dot("finished", 7 if entry is winner else 4.5, x(size), y(loss), _told(entry, goal))
        for entry, (size, loss) in zip(front, points, strict=True)
    ]
    return svg(WIDTH, HEIGHT, f"{name} over bytes, the front", [*marks, *ticks, *axes, path, *dots])


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    """A logarithmic scale."""
    bottom = math.log(max(low, 1e-9))
    span = max(1e-9, math.log(max(high, 1e-9)) - bottom)
    return lambda value: start + (math.log(max(value, 1e-9)) - bottom) / span * (end - start)


def _marks(low: float, high: float) -> list[float]:
    low = max(low, 1e-9)
    return [low * (max(high, low) / low) ** (step / 4) for step in range(5)]


def _told(entry: Validated, goal: Goal) -> str:
    return f"{entry.candidate.name}: {goal.told(entry.metrics)}"


def _dot(kind: str, radius: float, x: float, y: float, told: str) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(told)}</title></circle>'
