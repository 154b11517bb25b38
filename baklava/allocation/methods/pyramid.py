"""Fewer entries the deeper the layer."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from baklava.allocation.base import Allocation, Limits, Shares, proportional
from baklava.profiling.profile import Profile


@dataclass(frozen=True)
class Pyramid(Allocation):
    """Entries fall by the same step from layer to layer (PyramidKV, arXiv 2406.02069); heads of a layer are equal.

    The first layer gets 1 + `steepness` of the uniform share, the last 1 - `steepness`; 0 is uniform. The paper's beta
    is 1 / (1 - steepness), and its 20 the default.
    """

    name: ClassVar[str] = "pyramid"
    profiled: ClassVar[bool] = False

    steepness: float = 0.95

    def __post_init__(self) -> None:
        self.check(0 <= self.steepness < 1, "steepness must be within [0, 1)")

    @override
    def shares(self, profile: Profile, limits: Limits) -> Shares:
        geometry = profile.geometry
        layers = len(geometry.budgetable)
        falling = np.linspace(1 + self.steepness, 1 - self.steepness, layers) if layers > 1 else np.ones(1)
        weights = np.repeat(falling[:, None], geometry.kv_heads, axis=1)
        entries = proportional(weights, float(limits.total), float(limits.least), float(limits.most))
        return Shares.of(entries, limits.bits)
