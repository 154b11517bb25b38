"""The goal of a search: what it minimises, under which constraint, and the Pareto front of several numbers."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from baklava.evaluation.intervals import format_share
from baklava.serialization import FrozenModel

Objective = Literal["kl", "ppl"]
Metrics = dict[str, float]

LOSS_METRICS: dict[Objective, str] = {"kl": "kl_geometric", "ppl": "ppl"}
"""The metric that each objective minimises."""

LOSS_NAMES: dict[Objective, str] = {"kl": "KL", "ppl": "perplexity"}


class Goal(FrozenModel):
    """One of three: the best plan of size `budget`, the smallest within `max_dnll`, or a Pareto front of size and loss.

    `budget` is a share of the 16-bit full cache's bytes; with `front` it only chooses the point that becomes the plan.
    `max_dnll` is in nats per token above the full cache. With `latency`, the front also minimises the decode time.
    """

    objective: Objective = "kl"
    budget: Annotated[float, Field(gt=0, le=1)] | None = None
    max_dnll: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    front: bool = False
    latency: bool = False

    @property
    def samples_budget(self) -> bool:
        """Whether every trial samples its own size."""
        return self.front or self.max_dnll is not None

    @property
    def description(self) -> str:
        """What the search looks for, in words."""
        if self.front:
            return f"every size, for a front of {'bytes, loss and latency' if self.latency else 'bytes and loss'}"
        if self.max_dnll is not None:
            return f"the smallest size that loses at most {self.max_dnll:g} nats per token"
        return f"{format_share(self.budget or 0, 4)} of the bytes"

    def is_feasible(self, metrics: Metrics) -> bool:
        """Return whether a plan with these metrics stays within `max_dnll`."""
        return self.max_dnll is None or metrics["dnll"] <= self.max_dnll

    def loss(self, metrics: Metrics) -> float:
        """Return the loss by which plans of one size compare."""
        return metrics[LOSS_METRICS[self.objective] if self.max_dnll is None else "dnll"]

    @property
    def loss_name(self) -> str:
        """The name of the loss."""
        return LOSS_NAMES[self.objective] if self.max_dnll is None else "dNLL"

    @property
    def value_name(self) -> str:
        """The name of `objective_value`."""
        return "size" if self.max_dnll is not None else self.loss_name

    def objective_value(self, metrics: Metrics) -> float:
        """Return the number that the search minimises.

        With `max_dnll` it is the share of bytes of a feasible plan, and 1 + the excess in nats of an infeasible one.
        """
        if self.max_dnll is None:
            return self.loss(metrics)
        return metrics["ratio"] if self.is_feasible(metrics) else 1 + metrics["dnll"] - self.max_dnll

    def pareto_values(self, metrics: Metrics) -> tuple[float, ...]:
        """Return what a front minimises: share of bytes, loss, and with `latency` seconds per decode step."""
        return (metrics["ratio"], self.loss(metrics), *([metrics["decode_seconds"]] if self.latency else []))

    def format_metrics(self, metrics: Metrics) -> str:
        """Return the quality of a plan with these metrics, in words."""
        if self.max_dnll is not None:
            return f"{format_share(metrics['ratio'])} of the bytes at {metrics['dnll']:+.4f} nats per token"
        size = f" at {format_share(metrics['ratio'])} of the bytes" if self.front else ""
        time = f", {1e3 * metrics['decode_seconds']:.3g} ms a token" if self.latency else ""
        return f"{LOSS_NAMES[self.objective]} {self.loss(metrics):.4g}{size}{time}"


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
