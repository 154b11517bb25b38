"""Layer-wise allocation: all heads of a layer get the same number of entries.

- `Uniform`: the same in every layer.
- `PyramidKV`: fewer in deeper layers.
- `SqueezeAttention`: fewer in the layers that change the hidden state least.
"""

from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float
from typing_extensions import override

from baklava.allocation.base import Allocation, AllocationResult, Limits, distribute_proportionally
from baklava.allocation.importance import layer_importance
from baklava.profiling.profile import Profile


@dataclass(frozen=True)
class Uniform(Allocation):
    """Every KV head gets the same number of entries; the baseline."""

    name: ClassVar[str] = "uniform"
    needs_profile: ClassVar[bool] = False

    @override
    def allocate(self, profile: Profile, limits: Limits) -> AllocationResult:
        shape = (len(profile.geometry.full_attention_layers), profile.geometry.kv_heads)
        entries = min(limits.total_entries / limits.num_heads, float(limits.max_tokens))
        return AllocationResult.with_bits(np.full(shape, entries), limits.bits)


@dataclass(frozen=True)
class PyramidKV(Allocation):
    """Entries decrease linearly from layer to layer (PyramidKV, arXiv 2406.02069); heads of a layer are equal.

    The first layer gets 1 + `steepness` times the uniform share, the last 1 - `steepness`; 0 is uniform. The paper's
    beta is 1 / (1 - steepness); its default of 20 is ours too.
    """

    name: ClassVar[str] = "pyramidkv"
    needs_profile: ClassVar[bool] = False

    steepness: float = 0.95

    def __post_init__(self) -> None:
        self.require(0 <= self.steepness < 1, "steepness must be within [0, 1)")

    @override
    def allocate(self, profile: Profile, limits: Limits) -> AllocationResult:
        layers = len(profile.geometry.full_attention_layers)
        by_layer = np.linspace(1 + self.steepness, 1 - self.steepness, layers) if layers > 1 else np.ones(1)
        weights = np.repeat(by_layer[:, None], profile.geometry.kv_heads, axis=1)
        lower, upper = float(limits.min_tokens), float(limits.max_tokens)
        entries = distribute_proportionally(weights, float(limits.total_entries), lower, upper)
        return AllocationResult.with_bits(entries, limits.bits)


_NUM_CLUSTERS = 3


@dataclass(frozen=True)
class SqueezeAttention(Allocation):
    """The least important of three clusters of layers gives entries to the others (SqueezeAttention, 2404.04793).

    The layers of that cluster get `share` times the uniform share; all others divide the rest equally. If all layers
    are equally important, all get the same. Heads of a layer are equal. The paper clusters the layers of each prompt;
    here those of the profile are clustered.
    """

    name: ClassVar[str] = "squeeze_attention"

    share: float = 0.35

    def __post_init__(self) -> None:
        self.require(0 < self.share <= 1, "share must be within (0, 1]")

    @override
    def allocate(self, profile: Profile, limits: Limits) -> AllocationResult:
        squeezed = lowest_cluster(layer_importance(profile)[:, 0])
        others = (squeezed.size - squeezed.sum() * self.share) / max(1, (~squeezed).sum())
        by_layer = np.where(squeezed, self.share, others)[:, None]
        weights = np.repeat(by_layer, profile.geometry.kv_heads, axis=1)
        lower, upper = float(limits.min_tokens), float(limits.max_tokens)
        entries = distribute_proportionally(weights, float(limits.total_entries), lower, upper)
        return AllocationResult.with_bits(entries, limits.bits)


def lowest_cluster(values: Float[np.ndarray, " layers"]) -> Bool[np.ndarray, " layers"]:
    """Return which values are in the lowest of three least-squares clusters; none if all values are equal.

    Clusters of sorted numbers are intervals, so all pairs of cuts between different numbers are tried.
    """
    ordered = sorted(values.tolist())
    cuts = [cut for cut in range(1, len(ordered)) if ordered[cut] > ordered[cut - 1]]
    if not cuts:
        return np.zeros(len(values), dtype=bool)
    sums = [0.0, *accumulate(ordered)]
    squares = [0.0, *accumulate(value * value for value in ordered)]

    def squared_error(chosen: tuple[int, ...]) -> float:
        return sum(
            squares[stop] - squares[start] - (sums[stop] - sums[start]) ** 2 / (stop - start)
            for start, stop in pairwise((0, *chosen, len(ordered)))
        )

    best = min(combinations(cuts, min(_NUM_CLUSTERS - 1, len(cuts))), key=squared_error)
    return values < ordered[best[0]]
