"""Contestants at budgets, as plans; what a budget does not hold is left out and said so."""

from collections.abc import Sequence
from dataclasses import dataclass

from baklava.errors import UserError
from baklava.plan import BudgetPlan
from benchmarks.fidelity.methods import Contestant, Maker
from benchmarks.fidelity.windows import Texts


@dataclass(frozen=True)
class Entry:
    """A contestant at a budget. Of several plans, each window counts with their mean."""

    contestant: Contestant
    budget: float
    spec: str
    plans: tuple[BudgetPlan, ...]


@dataclass(frozen=True)
class LeftOut:
    """A contestant that a budget does not hold, and why."""

    method: str
    budget: float
    reason: str


def entries(
    contestants: Sequence[Contestant], budgets: Sequence[float], tokens: int, make: Maker
) -> tuple[list[Entry], list[LeftOut]]:
    """All contestants at all budgets of windows of `tokens`, and those that have no plan there."""
    found: list[Entry] = []
    left_out: list[LeftOut] = []
    for contestant in contestants:
        for budget in (budget for budget in budgets if budget in (contestant.budgets or budgets)):
            try:
                spec, plans = contestant.plans(budget, make)
                _check(plans, budget, tokens)
                found.append(Entry(contestant, budget, spec, plans))
            except UserError as error:
                left_out.append(LeftOut(contestant.name, budget, str(error)))
    return found, left_out


def _check(plans: Sequence[BudgetPlan], budget: float, tokens: int) -> None:
    for plan in plans:
        if plan.provenance.seed not in (None, Texts().seed):
            seed = plan.provenance.seed
            raise UserError(f"the plan was searched with seed {seed}, which saw other text; search with seed 0")
        if plan.context_length != tokens:
            raise UserError(f"the plan was made for {plan.context_length} tokens, but windows have {tokens}")
        if plan.ratio > budget:
            raise UserError(f"the plan takes {plan.ratio:.2%} of the bytes, more than the budget of {budget:.2%}")
