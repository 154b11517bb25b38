"""What all trials of a search share: the profile, the goal, the space, and the windows they are scored on."""

from dataclasses import dataclass

from baklava.plan import BudgetPlan
from baklava.profile import Profile
from tuning.goal import Goal
from tuning.settings import BITS, BitsName
from tuning.sizes import sizes_of
from tuning.space import Params, Space, plan_of


@dataclass(frozen=True)
class Task:
    """How parameters become a plan, and what it is scored on: `windows` are names, scored in this order.

    Plans store in one of `bits`.
    """

    profile: Profile
    goal: Goal
    context_length: int
    windows: tuple[str, ...]
    bits: tuple[BitsName, ...] = BITS

    @property
    def space(self) -> Space:
        """What trials draw."""
        sizes = sizes_of(self.profile.geometry, self.context_length) if self.goal.draws_budget else None
        return Space.of(self.profile, self.bits, sizes)

    def plan(self, params: Params) -> BudgetPlan:
        """The plan of a trial; raises UserError when the budget does not hold its knobs."""
        return plan_of(params, self.profile, budget=self.goal.budget, context_length=self.context_length)
