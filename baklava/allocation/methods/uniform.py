"""The same number of entries in every head."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from baklava.allocation.base import Allocation, Limits, Shares
from baklava.profiling.profile import Profile


@dataclass(frozen=True)
class Uniform(Allocation):
    """Every KV head gets the same; the baseline."""

    name: ClassVar[str] = "uniform"
    profiled: ClassVar[bool] = False

    @override
    def shares(self, profile: Profile, limits: Limits) -> Shares:
        shape = (len(profile.geometry.budgetable), profile.geometry.kv_heads)
        return Shares.of(np.full(shape, min(limits.total / limits.heads, float(limits.most))), limits.bits)
