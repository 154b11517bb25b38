"""The same number of entries in every head."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from typing_extensions import override

from baklava.allocation.base import Allocation, Limits
from baklava.profile import Profile


@dataclass(frozen=True)
class Uniform(Allocation):
    """Every KV head gets the same; the baseline."""

    name: ClassVar[str] = "uniform"
    profiled: ClassVar[bool] = False

    @override
    def shares(self, profile: Profile, limits: Limits) -> Float[np.ndarray, "layers kv_heads"]:
        shape = (len(profile.geometry.budgetable), profile.geometry.kv_heads)
        return np.full(shape, min(limits.total / np.prod(shape), limits.most))
