"""As many entries as get much attention."""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from baklava.allocation.base import Allocation, Limits, Shares
from baklava.allocation.score_thresholds import averaged_counts
from baklava.profiling.profile import Profile


@dataclass(frozen=True)
class HeavyHitterCounts(Allocation):
    """Entries above one threshold of the attention received, over all heads.

    The scores are those of `HeavyHitter()`: of the attention from at least 32 tokens away the mean square, the most in
    the query group. H2O (arXiv 2306.14048), whose idea they are, adds up the attention of all queries.

    Counted in each calibration window and averaged. `floor` is the least share of a head, relative to the uniform one.
    `tilt` favours late layers where above 0, early ones below.
    """

    name: ClassVar[str] = "heavy_hitter_counts"

    floor: float = 0.1
    tilt: float = 0.0

    def __post_init__(self) -> None:
        self.check(0 <= self.floor <= 1, "floor must be within [0, 1]")

    @override
    def shares(self, profile: Profile, limits: Limits) -> Shares:
        return Shares.of(averaged_counts(profile, "heavy_hitter", limits, self.floor, self.tilt), limits.bits)


@dataclass(frozen=True)
class ReconstructionCounts(Allocation):
    """Entries above one threshold of the attention they get while the model repeats the context (KVzip, 2505.23416).

    Counted over all heads in each calibration window, and averaged. `floor` is the least share of a head, relative to
    the uniform one. `tilt` favours late layers where above 0, early ones below.
    """

    name: ClassVar[str] = "reconstruction_counts"

    floor: float = 0.1
    tilt: float = 0.0

    def __post_init__(self) -> None:
        self.check(0 <= self.floor <= 1, "floor must be within [0, 1]")

    @override
    def shares(self, profile: Profile, limits: Limits) -> Shares:
        return Shares.of(averaged_counts(profile, "reconstruction", limits, self.floor, self.tilt), limits.bits)
