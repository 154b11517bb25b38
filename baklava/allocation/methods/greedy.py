"""Bytes where they save most."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from typing_extensions import override

from baklava.allocation.base import Allocation, Limits, Shares, filled
from baklava.allocation.curve_table import greedy_budgets, table_of
from baklava.profiling.profile import Measure, Profile


@dataclass(frozen=True)
class Greedy(Allocation):
    """Bytes go where the hull of a head's measured loss curve falls most steeply (LU-KV, arXiv 2602.08585).

    The least sum of losses over heads, were they independent and convex. `measure` is which loss; `bits` "given" takes
    those of the plan, "any" lets each head have whichever measured pair loses least.
    """

    name: ClassVar[str] = "greedy"

    measure: Measure = "error"
    bits: Literal["given", "any"] = "given"

    def __post_init__(self) -> None:
        self.check(self.measure in get_args(Measure), f"measure must be one of {', '.join(get_args(Measure))}")
        self.check(self.bits in ("given", "any"), "bits must be given or any")

    @override
    def shares(self, profile: Profile, limits: Limits) -> Shares:
        table = table_of(profile, self.measure, limits, [limits.bits] if self.bits == "given" else None)
        shares, _ = table.best(greedy_budgets(table))
        return filled(shares, limits)
