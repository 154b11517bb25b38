"""Threshold counts: the entries of each head that score above one threshold over all heads."""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from baklava.allocation.base import Allocation, AllocationResult, Limits
from baklava.allocation.profile_measures import mean_counts
from baklava.profiling.profile import Profile, RankingName


@dataclass(frozen=True)
class ThresholdCounts(Allocation):
    """Entries above one score threshold over all heads, counted in each calibration window and averaged.

    Attributes:
        floor: minimum of a head, relative to the uniform share.
        layer_tilt: favours late layers if above 0, early layers if below; see `mean_counts`.
    """

    ranking: ClassVar[RankingName]

    floor: float = 0.1
    layer_tilt: float = 0.0

    def __post_init__(self) -> None:
        self.require(0 <= self.floor <= 1, "floor must be within [0, 1]")

    @override
    def allocate(self, profile: Profile, limits: Limits) -> AllocationResult:
        counts = mean_counts(profile, self.ranking, limits, self.floor, self.layer_tilt)
        return AllocationResult.with_bits(counts, limits.bits)


class HeavyHitterCounts(ThresholdCounts):
    """Counts by the attention received, as scored by `HeavyHitter()`; the idea is H2O's (arXiv 2306.14048)."""

    name: ClassVar[str] = "heavy_hitter_counts"
    ranking: ClassVar[RankingName] = "heavy_hitter"


class ReconstructionCounts(ThresholdCounts):
    """Counts by the attention received while the model repeats the context (KVzip, arXiv 2505.23416)."""

    name: ClassVar[str] = "reconstruction_counts"
    ranking: ClassVar[RankingName] = "reconstruction"
