"""As many entries as it takes to repeat the context."""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from baklava.allocation.base import Allocation, Limits, Shares
from baklava.allocation.counts import averaged_counts
from baklava.profile import Profile


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
