"""What all trials of a search share: the profile, the budget, and the windows they are scored on."""

from dataclasses import dataclass

from baklava.plan import BudgetPlan
from baklava.profile import Profile
from tuning.settings import Objective
from tuning.space import Params, plan_of


@dataclass(frozen=True)
class Task:
    """How parameters become a plan, and what it is scored on: `windows` are names, scored in this order."""

    profile: Profile
    budget: float
    context_length: int
    windows: tuple[str, ...]
    objective: Objective

    def plan(self, params: Params) -> BudgetPlan:
        """The plan of a trial; raises UserError when the budget does not hold its knobs."""
        return plan_of(params, self.profile, budget=self.budget, context_length=self.context_length)
