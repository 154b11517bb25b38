"""The control: the same budgets, dealt to heads at random."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from typing_extensions import override

from baklava.allocation.base import Allocation, Limits, Shares, filled
from baklava.errors import UserError
from baklava.plan.budget_plan import AllocationChoice, BudgetPlan, LayerBudget
from baklava.profiling.profile import Profile


def permuted(plan: BudgetPlan, seed: int) -> BudgetPlan:
    """A plan whose heads have the capacities and bits of this one's, but in another order, and so the same bytes.

    What it loses more than the plan is what it is worth that the plan knows which head is which.
    """
    budgeted = [layer for layer in plan.layers if layer]
    grids = ("tokens", "key_bits", "value_bits")
    heads = np.concatenate([[getattr(layer, grid) for grid in grids] for layer in budgeted], axis=1)
    dealt = np.random.default_rng(seed).permutation(heads, axis=1).reshape(3, len(budgeted), -1)
    rows = iter(dealt.transpose(1, 0, 2).tolist())
    layers = (LayerBudget(**dict(zip(grids, next(rows), strict=True))) if layer else None for layer in plan.layers)
    choice = AllocationChoice(
        method="permuted",
        budget=plan.allocation.budget,
        knobs=plan.allocation.knobs | {"of": plan.allocation.method, "seed": seed},
    )
    return plan.model_copy(update={"layers": tuple(layers), "allocation": choice})


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
