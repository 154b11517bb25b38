"""BaKlaVa: entries in proportion to importance."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from typing_extensions import override

from baklava.allocation.base import Allocation, AllocationResult, Limits, distribute_proportionally
from baklava.allocation.profile_measures import REDUCTIONS, head_importance, layer_importance
from baklava.profiling.profile import ImportanceSource, Profile


@dataclass(frozen=True)
class Baklava(Allocation):
    """Entries ∝ importance^p × layer importance^q (our reading of BaKlaVa, arXiv 2502.13176).

    Attributes:
        importance_power: p, the contrast between heads; 0 makes them equal.
        layer_power: q, the contrast between layers; 0 makes them equal.
        floor: minimum of a head, relative to the uniform share.
        cap: maximum of a head, relative to the context.
        source: the head input that importance compares with the head's output.
        reduction: how the query group is reduced.
    """

    name: ClassVar[str] = "baklava"

    importance_power: float = 2.0
    layer_power: float = 0.0
    floor: float = 0.1
    cap: float = 1.0
    source: ImportanceSource = "value"
    reduction: Literal["mean", "max", "sum"] = "mean"

    def __post_init__(self) -> None:
        self.require(
            self.reduction in REDUCTIONS and 0 <= self.floor <= 1 and 0 < self.cap <= 1,
            f"reduction must be one of {', '.join(REDUCTIONS)}, floor within [0, 1], cap within (0, 1]",
        )
        self.require_bounded_powers(self.importance_power, self.layer_power)

    @override
    def allocate(self, profile: Profile, limits: Limits) -> AllocationResult:
        heads = head_importance(profile, self.source, self.reduction) ** self.importance_power
        weights = heads * layer_importance(profile) ** self.layer_power
        lower, upper = limits.bounds(self.floor, self.cap)
        entries = distribute_proportionally(weights, float(limits.total_entries), lower, upper)
        return AllocationResult.with_bits(entries, limits.bits)
