"""Allocation: where the bytes go. One method a file; `METHODS` maps names to classes; `allocate` makes the plan."""

import numpy as np
from jaxtyping import Int

from baklava.allocation.base import Allocation, Limits, Pair, Shares, proportional, rounded
from baklava.allocation.methods.adakv import HeadAdaptive
from baklava.allocation.methods.baklava import Baklava
from baklava.allocation.methods.blended import Blended
from baklava.allocation.methods.duo_attention import Duo
from baklava.allocation.methods.greedy import Greedy
from baklava.allocation.methods.pyramid import Pyramid
from baklava.allocation.methods.squeeze import Squeeze
from baklava.allocation.methods.threshold_counts import HeavyHitterCounts, ReconstructionCounts
from baklava.allocation.methods.uniform import Uniform
from baklava.allocation.perturbed import Shifted, permuted
from baklava.errors import UserError
from baklava.eviction import Eviction
from baklava.plan.budget_plan import AllocationChoice, BudgetPlan, EvictionChoice, LayerBudget, Provenance
from baklava.plan.byte_accounting import FULL_BITS, full_cache_bytes, sliding_window_bytes
from baklava.plan.geometry import CacheGeometry
from baklava.profiling.profile import Profile

_METHODS: tuple[type[Allocation], ...] = (
    Uniform,
    Baklava,
    Pyramid,
    Squeeze,
    Duo,
    HeadAdaptive,
    Greedy,
    HeavyHitterCounts,
    ReconstructionCounts,
    Blended,
)
METHODS: dict[str, type[Allocation]] = {method.name: method for method in _METHODS}
STEP = 8
"""Capacities are multiples of this many entries, so that heads of a layer often share one; see `rounded`."""

__all__ = [
    "METHODS",
    "Allocation",
    "Baklava",
    "Blended",
    "Duo",
    "Greedy",
    "HeadAdaptive",
    "HeavyHitterCounts",
    "Limits",
    "Pair",
    "Pyramid",
    "ReconstructionCounts",
    "Shares",
    "Shifted",
    "Squeeze",
    "Uniform",
    "allocate",
    "layers_of",
    "limits_of",
    "method_of",
    "permuted",
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
    bits: Pair = (16, 16),
    step: int = STEP,
    provenance: Provenance | None = None,
) -> BudgetPlan:
    """The plan that spends `budget` × the bytes of the full 16-bit cache, by this method.

    `bits` are those of keys and of values, where the method does not choose them itself; capacities are multiples of
    `step` entries, but for heads with the least or the most that they may have.

    Raises:
        UserError: the budget is not in (0, 1], or leaves less than sinks + one eviction interval per head.
    """
    graded = profile.key_channels is not None
    limits = limits_of(profile.geometry, budget, context_length, eviction.choice, bits, graded)
    shares = method.shares(profile, limits)
    return BudgetPlan(
        model=profile.model,
        geometry=profile.geometry,
        context_length=context_length,
        eviction=eviction.choice,
        allocation=AllocationChoice(method=method.name, budget=budget, knobs=method.knobs),
        provenance=provenance or Provenance(profile=profile.digest),
        layers=layers_of(profile.geometry, rounded(shares, limits, step), shares),
        key_channels=profile.key_channels,
    )


def limits_of(
    geometry: CacheGeometry,
    budget: float,
    context_length: int,
    eviction: EvictionChoice,
    bits: Pair = (16, 16),
    graded: bool = False,
) -> Limits:
    """What `budget` x the bytes of the full 16-bit cache leave to spend; raises UserError where that is too little."""
    if not 0 < budget <= 1:
        raise UserError(f"budget {budget} must be above 0 and at most 1: a share of the full cache's bytes")
    # Sliding layers keep their window whatever the plan says; only the rest can be spent.
    spendable = int(budget * full_cache_bytes(geometry, context_length)) - sliding_window_bytes(geometry, FULL_BITS)
    # A head that never evicts holds the whole text and the slack of an interval; a ring has no slack.
    most = context_length + (eviction.interval if eviction.scored else 0)
    limits = Limits(geometry, eviction, max(0, spendable), eviction.minimum_tokens, most, bits, graded)
    if limits.total // limits.heads < limits.least:
        beside = f" beside {eviction.centroids} centroids" if eviction.centroids else ""
        raise UserError(
            f"budget {budget:g} leaves {limits.total // limits.heads} entries per head{beside}, but {eviction.sinks} "
            f"sinks and an eviction every {eviction.interval} tokens need {limits.least}; raise the budget or lower "
            f"the interval{' or the centroids' if beside else ''}"
        )
    return limits


def layers_of(
    geometry: CacheGeometry, tokens: Int[np.ndarray, "layers kv_heads"], shares: Shares
) -> tuple[LayerBudget | None, ...]:
    """The budgets of all layers, with the bits of `shares`; None where a layer slides."""
    grids = (tokens.tolist(), shares.key_bits.tolist(), shares.value_bits.tolist())
    budgets = (
        LayerBudget(tokens=tuple(row), key_bits=tuple(keys), value_bits=tuple(values))
        for row, keys, values in zip(*grids, strict=True)
    )
    return tuple(next(budgets) if window is None else None for window in geometry.windows)
