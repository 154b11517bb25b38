"""The allocation plug-in: a dataclass with one verb that says how many entries each KV head deserves."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from baklava.profile import Profile


@dataclass(frozen=True)
class Limits:
    """What an allocation has to spend: `total` entries over all budgeted heads, each between `least` and `most`."""

    total: int
    least: int
    most: int


@dataclass(frozen=True)
class Allocation(ABC):
    """Spreads a number of entries over the (layer, KV head) grid."""

    name: ClassVar[str]
    profiled: ClassVar[bool] = True
    """Whether the method asks the profile for more than the geometry."""

    @abstractmethod
    def shares(self, profile: Profile, limits: Limits) -> Float[np.ndarray, "layers kv_heads"]:
        """Entries per KV head, not yet rounded; the sum is at most `limits.total`, each within the limits.

        Rows are the budgetable layers.
        """

    @property
    def knobs(self) -> dict[str, bool | int | float | str]:
        """The method's knobs by name."""
        return {knob.name: getattr(self, knob.name) for knob in fields(self)}


def proportional(
    weights: Float[np.ndarray, "layers kv_heads"], total: float, least: float, most: float
) -> Float[np.ndarray, "layers kv_heads"]:
    """Spread `total` in proportion to the weights, every share within [least, most].

    The scale is found by bisection: the sum of the clipped shares grows with it. When all heads reach `most`, less
    than `total` is spent.
    """
    weights = np.maximum(weights, 1e-12)
    low, high = 0.0, most / weights.min()
    for _ in range(200):
        middle = (low + high) / 2
        if np.clip(weights * middle, least, most).sum() <= total:
            low = middle
        else:
            high = middle
    return np.clip(weights * low, least, most)


def rounded(
    shares: Float[np.ndarray, "layers kv_heads"], limits: Limits, step: int
) -> Int[np.ndarray, "layers kv_heads"]:
    """Round to multiples of `step`, so that heads share capacities; the total is met to within a step, never exceeded.

    Shares are rounded down, then the entries left go, a step each, to the heads with the largest remainders.
    """
    levels = np.maximum(np.floor(shares / step) * step, limits.least).astype(int)
    for index in np.argsort(levels - shares, axis=None, kind="stable"):
        spare = limits.total - levels.sum()
        if spare < step:
            break
        levels.flat[index] += min(step, limits.most - levels.flat[index])
    return levels
