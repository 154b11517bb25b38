"""Entries in proportion to importance."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float
from typing_extensions import override

from baklava.allocation.base import Allocation, Limits, Shares, proportional
from baklava.errors import UserError
from baklava.profile import Profile, Source

_REDUCTIONS: dict[str, Callable[..., np.ndarray]] = {"mean": np.mean, "max": np.max, "sum": np.sum}


@dataclass(frozen=True)
class Baklava(Allocation):
    """Budgets ∝ importance^p × layer importance^q (our reading of BaKlaVa, arXiv 2502.13176).

    `importance_power` p and `layer_power` q sharpen the contrast between heads and between layers; 0 makes them
    equal. `floor` is the least share of a head, relative to the uniform one; `cap` the most, relative to the context.
    `source` is the head input that importance compares with, `reduction` joins the query group.
    """

    name: ClassVar[str] = "baklava"

    importance_power: float = 2.0
    layer_power: float = 0.0
    floor: float = 0.1
    cap: float = 1.0
    source: Source = "value"
    reduction: Literal["mean", "max", "sum"] = "mean"

    def __post_init__(self) -> None:
        if self.reduction not in _REDUCTIONS or not 0 <= self.floor <= 1 or not 0 < self.cap <= 1:
            raise UserError(
                f"baklava with reduction {self.reduction!r}, floor {self.floor}, cap {self.cap}: reduction must be one "
                f"of {', '.join(_REDUCTIONS)}, floor within [0, 1], cap within (0, 1]"
            )

    @override
    def shares(self, profile: Profile, limits: Limits) -> Shares:
        weights = self._head_weights(profile) * self._layer_weights(profile)
        uniform = limits.total / weights.size
        least = max(float(limits.least), self.floor * uniform)
        most = max(self.cap * limits.most, uniform)
        entries = proportional(weights, float(limits.total), least, min(most, float(limits.most)))
        return Shares.of(entries, limits.bits)

    def _head_weights(self, profile: Profile) -> Float[np.ndarray, "layers kv_heads"]:
        if self.source not in profile.importance:
            raise UserError(
                f"the profile of {profile.model.id} has no source {self.source!r}; choose one of "
                f"{', '.join(profile.importance)}"
            )
        geometry = profile.geometry
        grid = np.array(profile.importance[self.source])[list(geometry.budgetable)]
        grouped = grid.reshape(-1, geometry.kv_heads, geometry.query_group)
        return np.maximum(_REDUCTIONS[self.reduction](grouped, axis=2), 0) ** self.importance_power

    def _layer_weights(self, profile: Profile) -> Float[np.ndarray, "layers 1"]:
        layers = np.array(profile.layer_importance)[list(profile.geometry.budgetable)]
        return np.maximum(layers, 1e-6)[:, None] ** self.layer_power  # above 0, since the power may be negative
