"""Allocation: where the bytes go. One method a file; `METHODS` maps names to classes; `allocate` makes the plan."""

from collections.abc import Sequence

import numpy as np

from baklava.allocation.baklava import Baklava
from baklava.allocation.base import Allocation, Limits, proportional, rounded
from baklava.allocation.uniform import Uniform
from baklava.errors import UserError
from baklava.eviction import Eviction
from baklava.geometry import CacheGeometry
from baklava.plan import (
    AllocationChoice,
    Bits,
    BudgetPlan,
    EvictionChoice,
    LayerBudget,
    Provenance,
    entry_bytes,
    full_bytes,
    sliding_bytes,
)
from baklava.profile import Profile

METHODS: dict[str, type[Allocation]] = {method.name: method for method in (Uniform, Baklava)}
STEP = 8
"""Capacities are multiples of this many entries, so that heads of a layer often share one."""

__all__ = [
    "METHODS",
    "Allocation",
    "Baklava",
    "Limits",
    "Uniform",
    "allocate",
    "method_of",
    "proportional",
]


def method_of(name: str) -> type[Allocation]:
    """The class of an allocation method; an unknown name lists the known ones."""
    if name not in METHODS:
        raise UserError(f"unknown allocation method {name!r}; choose one of {', '.join(METHODS)}, or full")
    return METHODS[name]


def allocate(
    profile: Profile,
    *,
    budget: float,
    context_length: int,
    method: Allocation,
    eviction: Eviction,
    bits: Bits = 16,
    provenance: Provenance | None = None,
) -> BudgetPlan:
    """The plan that spends `budget` × the bytes of the full 16-bit cache, by this method.

    Raises:
        UserError: the budget is not in (0, 1], or leaves less than sinks + one eviction interval per head.
    """
    limits = _limits(profile.geometry, budget, context_length, eviction.choice, bits)
    tokens = rounded(method.shares(profile, limits), limits, STEP)
    return BudgetPlan(
        model=profile.model,
        geometry=profile.geometry,
        context_length=context_length,
        eviction=eviction.choice,
        allocation=AllocationChoice(method=method.name, budget=budget, knobs=method.knobs),
        provenance=provenance or Provenance(profile=profile.digest),
        layers=_layers(profile.geometry, tokens, bits),
        sliding_bits=bits,
    )


def _limits(geometry: CacheGeometry, budget: float, context_length: int, eviction: EvictionChoice, bits: int) -> Limits:
    if not 0 < budget <= 1:
        raise UserError(f"budget {budget} must be above 0 and at most 1: a share of the full cache's bytes")
    heads = len(geometry.budgetable) * geometry.kv_heads
    # Sliding layers keep their window whatever the plan says; only the rest can be spent.
    spendable = int(budget * full_bytes(geometry, context_length)) - sliding_bytes(geometry, bits)
    total = max(0, spendable) // entry_bytes(geometry, bits, bits, eviction.scored)
    if total // heads < eviction.minimum_tokens:
        raise UserError(
            f"budget {budget:g} leaves {total // heads} entries per head, but {eviction.sinks} sinks and an eviction "
            f"every {eviction.interval} tokens need {eviction.minimum_tokens}; raise the budget or lower the interval"
        )
    # A head that never evicts holds the whole text and the slack of an interval; a ring has no slack.
    most = context_length + (eviction.interval if eviction.scored else 0)
    return Limits(total=total, least=eviction.minimum_tokens, most=most)


def _layers(geometry: CacheGeometry, tokens: np.ndarray, bits: Bits) -> tuple[LayerBudget | None, ...]:
    rows: Sequence[Sequence[int]] = tokens.tolist()
    budgets = iter(rows)
    same = (bits,) * geometry.kv_heads
    return tuple(
        LayerBudget(tokens=tuple(next(budgets)), key_bits=same, value_bits=same) if window is None else None
        for window in geometry.windows
    )
