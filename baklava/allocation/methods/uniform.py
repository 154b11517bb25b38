"""Uniform: the same number of entries in every head."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from baklava.allocation.base import Allocation, AllocationResult, Limits
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
