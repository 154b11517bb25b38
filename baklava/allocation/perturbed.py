"""Plans derived from others: factors on each head's entries for local search, and budgets shuffled as a control."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from typing_extensions import override

from baklava.allocation.base import Allocation, AllocationResult, Limits, scale_to_budget
from baklava.errors import UserError
from baklava.plan.budget_plan import AllocationConfig, BudgetPlan, LayerBudget
from baklava.profiling.profile import Profile


@dataclass(frozen=True)
class Perturbed(Allocation):
    """Entries of a base method times 2^factor per head, scaled back to the same bytes; bits of the base method.

    It is not in `METHODS`, since nobody writes a grid by hand: local search refines a plan with it.

    Attributes:
        base: method that is perturbed.
        log2_factors: a row per full-attention layer and a number per KV head; 0 leaves a head unchanged before scaling.
    """

    name: ClassVar[str] = "perturbed"

    base: Allocation
    log2_factors: tuple[tuple[float, ...], ...]

    @override
    def allocate(self, profile: Profile, limits: Limits) -> AllocationResult:
        result = self.base.allocate(profile, limits)
        rows, columns = result.entries.shape
        if len(self.log2_factors) != rows or {len(row) for row in self.log2_factors} != {columns}:
            raise UserError(
                f"log2_factors of {len(self.log2_factors)} layers do not fit {rows} layers of {columns} KV heads; give "
                "one number per head"
            )
        return scale_to_budget(replace(result, entries=result.entries * np.exp2(self.log2_factors)), limits)


def shuffled(plan: BudgetPlan, seed: int) -> BudgetPlan:
    """Return a plan with the capacities and bits of this one, assigned to other heads at random; bytes are equal.

    The difference in loss is what the plan gains by knowing which head is which.
    """
    budgets = [layer for layer in plan.layers if layer]
    grids = ("tokens", "key_bits", "value_bits")
    heads = np.concatenate([[getattr(layer, grid) for grid in grids] for layer in budgets], axis=1)
    permuted = np.random.default_rng(seed).permutation(heads, axis=1).reshape(3, len(budgets), -1)
    rows = iter(permuted.transpose(1, 0, 2).tolist())
    layers = (LayerBudget(**dict(zip(grids, next(rows), strict=True))) if layer else None for layer in plan.layers)
    base = plan.allocation.model_dump(include={"method", "params"})
    config = AllocationConfig(method="shuffled", budget=plan.allocation.budget, params={"base": base, "seed": seed})
    return plan.model_copy(update={"layers": tuple(layers), "allocation": config})
