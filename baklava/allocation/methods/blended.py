"""All that a profile says of a head, weighed."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from typing_extensions import override

from baklava.allocation.base import Allocation, Grid, Limits, Shares, filled, head_costs, proportional
from baklava.allocation.curve_table import Bytes, Table, curve_counts, table_of
from baklava.allocation.importance import head_importance, layer_importance
from baklava.allocation.score_thresholds import averaged_counts
from baklava.profiling.profile import Measure, Profile


@dataclass(frozen=True)
class Blended(Allocation):
    """Entries ∝ reconstruction counts^a × importance^b × layer importance^c × curve counts^d, our own.

    `reconstruction_power` a, `importance_power` b, `layer_power` c and `curve_power` d; a factor of power 0 is not
    asked for. Curve counts are what lose least by the loss curves of `measure`, in the bits of the plan. `floor` is the
    least share of a head, relative to the uniform one; `cap` the most, relative to the context. With `bits` "curves",
    each head then takes the measured bits that lose least at its bytes, by the same curves; what full heads leave over
    raises the bytes of all.
    """

    name: ClassVar[str] = "blended"

    reconstruction_power: float = 1.0
    importance_power: float = 0.0
    layer_power: float = 0.0
    curve_power: float = 0.0
    floor: float = 0.1
    cap: float = 1.0
    measure: Measure = "text"
    bits: Literal["given", "curves"] = "given"

    def __post_init__(self) -> None:
        self.check(0 <= self.floor <= 1 and 0 < self.cap <= 1, "floor must be within [0, 1], cap within (0, 1]")
        self.check(self.measure in get_args(Measure), f"measure must be one of {', '.join(get_args(Measure))}")
        self.check(self.bits in ("given", "curves"), "bits must be given or curves")
        self.check_powers(self.reconstruction_power, self.importance_power, self.layer_power, self.curve_power)

    @override
    def shares(self, profile: Profile, limits: Limits) -> Shares:
        least, most = limits.within(self.floor, self.cap)
        entries = proportional(self._weights(profile, limits), float(limits.total), least, most)
        shares = Shares.of(entries, limits.bits)
        return shares if self.bits == "given" else self._in_best_bits(shares, profile, limits)

    def _weights(self, profile: Profile, limits: Limits) -> Grid:
        weights = np.ones((len(profile.geometry.budgetable), profile.geometry.kv_heads))
        if self.reconstruction_power:
            weights *= averaged_counts(profile, "reconstruction", limits, self.floor) ** self.reconstruction_power
        if self.importance_power:
            weights *= np.maximum(head_importance(profile), 1e-6) ** self.importance_power
        if self.layer_power:
            weights *= layer_importance(profile) ** self.layer_power
        if self.curve_power:
            weights *= curve_counts(profile, self.measure, limits) ** self.curve_power
        return weights / weights.max()

    def _in_best_bits(self, shares: Shares, profile: Profile, limits: Limits) -> Shares:
        """The bits that lose least at each head's bytes, all of which are raised until the bytes are spent."""
        table = table_of(profile, self.measure, limits)
        budgets = head_costs(shares, limits).ravel()
        low, high = 1.0, max(1.0, table.costs.max() / budgets.min())
        for _ in range(20):
            middle = (low + high) / 2
            within = head_costs(_best(table, middle * budgets, shares), limits).sum() <= limits.bytes
            low, high = (middle, high) if within else (low, middle)
        return filled(_best(table, low * budgets, shares), limits)


def _best(table: Table, budgets: Bytes, otherwise: Shares) -> Shares:
    """The heads as they lose least at these bytes; as they were where no measured bits fit."""
    best, without = table.best(budgets)
    return Shares(
        np.where(without, otherwise.entries, best.entries),
        np.where(without, otherwise.key_bits, best.key_bits),
        np.where(without, otherwise.value_bits, best.value_bits),
    )
