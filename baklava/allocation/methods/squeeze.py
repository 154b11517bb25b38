"""Less for the layers that change the hidden state least."""

from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float
from typing_extensions import override

from baklava.allocation.base import Allocation, Limits, Shares, proportional
from baklava.allocation.importance import layer_importance
from baklava.profiling.profile import Profile

_CLUSTERS = 3


@dataclass(frozen=True)
class Squeeze(Allocation):
    """Layers in three clusters by importance, of which the least gives to the others (SqueezeAttention, 2404.04793).

    The layers of the least important cluster get `share` of the uniform share, all others the rest in equal parts; so
    do all where every layer matters alike. Heads of a layer are equal. The paper clusters each prompt anew; here it is
    the profile that is clustered.
    """

    name: ClassVar[str] = "squeeze"

    share: float = 0.35

    def __post_init__(self) -> None:
        self.check(0 < self.share <= 1, "share must be within (0, 1]")

    @override
    def shares(self, profile: Profile, limits: Limits) -> Shares:
        last = least_cluster(layer_importance(profile)[:, 0])
        rest = (last.size - last.sum() * self.share) / max(1, (~last).sum())
        layers = np.where(last, self.share, rest)[:, None]
        weights = np.repeat(layers, profile.geometry.kv_heads, axis=1)
        entries = proportional(weights, float(limits.total), float(limits.least), float(limits.most))
        return Shares.of(entries, limits.bits)


def least_cluster(values: Float[np.ndarray, " layers"]) -> Bool[np.ndarray, " layers"]:
    """Which values are in the lowest of three clusters of least squares; none where all are equal.

    Sorted numbers are clustered by cutting, so all cuts are tried, but for those between equal numbers.
    """
    ordered = sorted(values.tolist())
    cuts = [cut for cut in range(1, len(ordered)) if ordered[cut] > ordered[cut - 1]]
    if not cuts:
        return np.zeros(len(values), dtype=bool)
    sums = [0.0, *accumulate(ordered)]
    squares = [0.0, *accumulate(value * value for value in ordered)]

    def within(first: int, last: int) -> float:
        return squares[last] - squares[first] - (sums[last] - sums[first]) ** 2 / (last - first)

    def spread(chosen: tuple[int, ...]) -> float:
        return sum(within(first, last) for first, last in pairwise((0, *chosen, len(ordered))))

    best = min(combinations(cuts, min(_CLUSTERS - 1, len(cuts))), key=spread)
    return values < ordered[best[0]]
