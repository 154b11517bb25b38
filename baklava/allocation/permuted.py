"""The control: the same budgets, dealt to heads at random."""

import numpy as np

from baklava.plan import AllocationChoice, BudgetPlan, LayerBudget


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
