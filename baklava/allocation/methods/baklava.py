"""Entries in proportion to importance."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from typing_extensions import override

from baklava.allocation.base import Allocation, Limits, Shares, proportional
from baklava.allocation.importance import REDUCTIONS, head_importance, layer_importance
from baklava.profiling.profile import Profile, Source


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
        right = self.reduction in REDUCTIONS and 0 <= self.floor <= 1 and 0 < self.cap <= 1
        self.check(right, f"reduction must be one of {', '.join(REDUCTIONS)}, floor within [0, 1], cap within (0, 1]")
        self.check_powers(self.importance_power, self.layer_power)

    @override
    def shares(self, profile: Profile, limits: Limits) -> Shares:
        heads = head_importance(profile, self.source, self.reduction) ** self.importance_power
        weights = heads * layer_importance(profile) ** self.layer_power
        least, most = limits.within(self.floor, self.cap)
        return Shares.of(proportional(weights, float(limits.total), least, most), limits.bits)
