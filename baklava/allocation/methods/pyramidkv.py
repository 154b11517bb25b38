"""PyramidKV: fewer entries in deeper layers."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from baklava.allocation.base import Allocation, AllocationResult, Limits, distribute_proportionally
from baklava.profiling.profile import Profile


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
