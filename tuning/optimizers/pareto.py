"""Pareto fronts: what nothing else beats in two or more numbers that are all minimised."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Key = Callable[[Item], tuple[float, ...]]


def non_dominated(items: Sequence[Item], key: Key[Item]) -> list[Item]:
    """Return the items that no other one beats in every number, ordered by the first; of equal ones, the first."""
    front: list[Item] = []
    for item in sorted(items, key=key):
        # Whatever beats it in every number was sorted before it.
        if not any(all(a <= b for a, b in zip(key(other), key(item), strict=True)) for other in front):
            front.append(item)
    return front


def subsample(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most `count` items of a sequence, spread evenly and including both ends."""
    if len(items) <= count:
        return list(items)
    return [items[round(number * (len(items) - 1) / max(1, count - 1))] for number in range(count)]


def knee(front: Sequence[Item], key: Key[Item]) -> Item:
    """Return the item furthest below the line between both ends of a front, in the logarithms of both numbers."""
    points = [(math.log(max(x, 1e-9)), math.log(max(y, 1e-9))) for x, y, *_ in map(key, front)]
    (left, top), (right, bottom) = points[0], points[-1]
    slope = (bottom - top) / (right - left) if right > left else 0.0
    below = [top + slope * (x - left) - y for x, y in points]
    return front[below.index(max(below))]


def nearest(front: Sequence[Item], size: Callable[[Item], float], target: float) -> Item:
    """Return the item whose size is nearest to the target, as a ratio."""
    return min(front, key=lambda item: abs(math.log(size(item) / target)))
