"""Greedy: bytes go to the heads that gain most from them."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from typing_extensions import override

from baklava.allocation.base import Allocation, AllocationResult, Limits, scale_to_budget
from baklava.allocation.loss_table import LossTable, greedy_bytes
from baklava.profiling.profile import LossMeasure, Profile


@dataclass(frozen=True)
class Greedy(Allocation):
    """Bytes go to the head whose loss curve has the steepest convex hull (LU-KV, arXiv 2602.08585).

    The sum of losses is minimal if heads are independent and their curves convex.

    Attributes:
        measure: loss of the curves.
        bits: "fixed" uses the bits of the plan; with "any" each head takes the measured pair that loses least.
    """

    name: ClassVar[str] = "greedy"

    measure: LossMeasure = "error"
    bits: Literal["fixed", "any"] = "fixed"

    def __post_init__(self) -> None:
        measures = get_args(LossMeasure)
        self.require(self.measure in measures, f"measure must be one of {', '.join(measures)}")
        self.require(self.bits in ("fixed", "any"), "bits must be fixed or any")

    @override
    def allocate(self, profile: Profile, limits: Limits) -> AllocationResult:
        table = LossTable.from_profile(profile, self.measure, limits, [limits.bits] if self.bits == "fixed" else None)
        result, _ = table.best_bits(greedy_bytes(table))
        return scale_to_budget(result, limits)
