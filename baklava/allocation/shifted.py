"""Another method's plan, corrected head by head."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from typing_extensions import override

from baklava.allocation.base import Allocation, Limits, Shares, filled
from baklava.errors import UserError
from baklava.profile import Profile


@dataclass(frozen=True)
class Shifted(Allocation):
    """Entries of another method × 2^shift, scaled back to the same bytes; bits as that method says.

    `shifts` has a row per budgeted layer and a number per KV head; 0 leaves a head, but for the scaling. It has no name
    in `METHODS`: it takes a method and a grid, which nobody writes by hand, and is how a search refines a plan.
    """

    name: ClassVar[str] = "shifted"

    of: Allocation
    shifts: tuple[tuple[float, ...], ...]

    @override
    def shares(self, profile: Profile, limits: Limits) -> Shares:
        shares = self.of.shares(profile, limits)
        rows, columns = shares.entries.shape
        if len(self.shifts) != rows or {len(row) for row in self.shifts} != {columns}:
            raise UserError(
                f"shifts of {len(self.shifts)} layers do not fit {rows} layers of {columns} KV heads; give a number "
                "for each head"
            )
        return filled(replace(shares, entries=shares.entries * np.exp2(self.shifts)), limits)
