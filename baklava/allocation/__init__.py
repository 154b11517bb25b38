"""Allocation: where the bytes go. `METHODS` maps names to classes; `allocate` makes the plan."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from baklava.allocation.base import (
    Allocation,
    AllocationResult,
    BitPair,
    Limits,
    distribute_proportionally,
    missing_profile_error,
    round_to_steps,
)
from baklava.allocation.greedy import Greedy
from baklava.allocation.importance import Baklava, Blended
from baklava.allocation.layerwise import PyramidKV, SqueezeAttention, Uniform
from baklava.allocation.perturbed import Perturbed, shuffled
from baklava.allocation.score_thresholds import AdaKV, DuoAttention, HeavyHitterCounts, ReconstructionCounts
from baklava.errors import UserError
from baklava.eviction import Eviction
from baklava.plan.budget_plan import (
    AllocationConfig,
    BudgetPlan,
    EvictionConfig,
    LayerBudget,
    PrefillConfig,
    Provenance,
)
from baklava.plan.geometry import FULL_BITS, CacheGeometry, full_cache_bytes, unbudgeted_bytes
from baklava.profiling.profile import Profile

_METHODS: tuple[type[Allocation], ...] = (
    Uniform,
    Baklava,
    PyramidKV,
    SqueezeAttention,
    DuoAttention,
    AdaKV,
    Greedy,
    HeavyHitterCounts,
    ReconstructionCounts,
    Blended,
)
METHODS: dict[str, type[Allocation]] = {method.name: method for method in _METHODS}
"""Methods that users name."""

CAPACITY_STEP_ENTRIES = 8
"""Capacities are multiples of this many entries, so that heads of a layer often share one; see `round_to_steps`."""

__all__ = [
    "METHODS",
    "AdaKV",
    "Allocation",
    "AllocationResult",
    "Baklava",
    "BitPair",
    "Blended",
    "DuoAttention",
    "Greedy",
    "HeavyHitterCounts",
    "Limits",
    "Perturbed",
    "PyramidKV",
    "ReconstructionCounts",
    "SqueezeAttention",
    "Uniform",
    "allocate",
    "budget_limits",
    "build_allocation",
    "distribute_proportionally",
    "layer_budgets",
    "method_class",
    "shuffled",
]


def method_class(name: str) -> type[Allocation]:
    """Return the class of an allocation method; the error about an unknown name lists the known ones."""
    if name not in METHODS:
        raise UserError(f"unknown allocation method {name!r}; choose one of {', '.join(METHODS)}, or full")
    return METHODS[name]


def build_allocation(method: str, params: Mapping[str, Any]) -> Allocation:
    """Return the allocation method that a plan names, from the plain data of its AllocationConfig.

    Nothing in this package calls it, since a plan has its budgets already. It is for those who want the same method at
    another budget, or for another model.

    Raises:
        UserError: the method is unknown, or the parameters are not the method's.
    """
    cls = Perturbed if method == Perturbed.name else method_class(method)
    try:
        return cls(**{name: _param_from_data(value) for name, value in params.items()})
    except TypeError as error:
        raise UserError(f"the parameters {dict(params)} do not fit {method} ({error}); make a new plan") from None


def _param_from_data(value: Any) -> Any:
    if isinstance(value, dict):
        method, params = value.get("method"), value.get("params")
        if not (isinstance(method, str) and isinstance(params, dict)):
            raise UserError(f"{value} is not a method in a plan, which has a method and params; make a new plan")
        return build_allocation(method, params)
    return tuple(_param_from_data(item) for item in value) if isinstance(value, list) else value


def allocate(
    profile: Profile,
    *,
    budget: float,
    context_length: int,
    method: Allocation,
    eviction: Eviction,
    bits: BitPair = (16, 16),
    step: int = CAPACITY_STEP_ENTRIES,
    prefill: PrefillConfig | None = None,
    provenance: Provenance | None = None,
) -> BudgetPlan:
    """Return the plan that spends `budget` times the bytes of the full 16-bit cache.

    Args:
        profile: what was measured of the model.
        budget: ratio of the bytes of the full 16-bit cache at `context_length`.
        context_length: tokens of a sequence at which the ratio holds.
        method: how the bytes are spread over the heads.
        eviction: which entries stay.
        bits: bits of keys and values, for methods that do not choose them.
        step: capacities are multiples of this many entries, except for heads with the minimum or maximum capacity.
        prefill: how prompts are processed; densely by default.
        provenance: recorded in the plan; the profile's digest by default.

    Raises:
        UserError: the budget is not in (0, 1], or leaves less than the minimum capacity of a head, or the profile has
            no predictors and the eviction method needs them.
    """
    if eviction.predicted_share and profile.score_predictors is None:
        raise missing_profile_error(profile, "score predictors")
    mixed_precision = profile.key_channels is not None
    limits = budget_limits(profile.geometry, budget, context_length, eviction.config, bits, mixed_precision)
    result = method.allocate(profile, limits)
    return BudgetPlan(
        model=profile.model,
        geometry=profile.geometry,
        context_length=context_length,
        eviction=eviction.config,
        allocation=AllocationConfig(method=method.name, budget=budget, params=method.params),
        prefill=prefill or PrefillConfig(),
        provenance=provenance or Provenance(profile=profile.digest),
        layers=layer_budgets(profile.geometry, round_to_steps(result, limits, step), result),
        key_channels=profile.key_channels,
        score_predictors=profile.score_predictors if eviction.predicted_share else None,
    )


def check_budget(budget: float) -> None:
    """Raise UserError if a budget is no share of the bytes of the full cache."""
    if not 0 < budget <= 1:
        raise UserError(f"budget {budget} must be above 0 and at most 1: a ratio of the full cache's bytes")


def budget_limits(
    geometry: CacheGeometry,
    budget: float,
    context_length: int,
    eviction: EvictionConfig,
    bits: BitPair = (16, 16),
    mixed_precision: bool = False,
) -> Limits:
    """Return what `budget` times the bytes of the full 16-bit cache leaves to spend.

    Raises:
        UserError: the budget is not in (0, 1], or leaves less than the minimum capacity of a head.
    """
    check_budget(budget)
    full_bytes = full_cache_bytes(geometry, context_length)
    # Sliding windows and states stay whatever the plan says; only the rest can be spent.
    fixed = unbudgeted_bytes(geometry, FULL_BITS, context_length)
    budget_bytes = int(budget * full_bytes) - fixed
    # A scored head needs the tokens of one interval on top of the text to never evict; a ring buffer does not.
    max_tokens = context_length + (eviction.eviction_interval if eviction.scored else 0)
    min_tokens = eviction.min_tokens
    limits = Limits(geometry, eviction, max(0, budget_bytes), min_tokens, max_tokens, bits, mixed_precision)
    # Rounded up to four digits
    smallest = math.ceil((fixed + limits.min_bytes) / full_bytes * 1e4) / 1e4
    raise_it = (
        f"raise it to at least {smallest:g}" if smallest <= 1 else f"no budget suffices for {context_length} tokens"
    )
    if budget_bytes < 0:
        raise UserError(
            f"budget {budget:g} is {int(budget * full_bytes):,} bytes, but the {geometry.unbudgeted} alone take "
            f"{fixed:,}, which no plan changes; {raise_it}"
        )
    entries_per_head = limits.total_entries // limits.num_heads
    if entries_per_head < min_tokens:
        centroids = f" and {eviction.centroids} centroids" if eviction.centroids else ""
        reason = f"an eviction every {eviction.eviction_interval} tokens"
        knobs = {"the eviction interval": eviction.eviction_interval > 1, "the centroids": eviction.centroids}
        if eviction.residual_length > eviction.eviction_interval:
            reason = f"a residual of {eviction.residual_length}"
            knobs = {"the residual_length": True, "the centroids": eviction.centroids}
        lower = [knob for knob, is_above_least in knobs.items() if is_above_least]
        raise UserError(
            f"budget {budget:g} leaves {entries_per_head} entries per head{centroids}, but {eviction.sinks} "
            f"sinks and {reason} need {min_tokens}; {raise_it}" + (f", or lower {' or '.join(lower)}" if lower else "")
        )
    return limits


def layer_budgets(
    geometry: CacheGeometry, tokens: Int[np.ndarray, "layers kv_heads"], result: AllocationResult
) -> tuple[LayerBudget | None, ...]:
    """Return the budgets of all layers, in the bits of `result`; None for a sliding layer."""
    grids = (tokens.tolist(), result.key_bits.tolist(), result.value_bits.tolist())
    budgets = (
        LayerBudget(tokens=tuple(row), key_bits=tuple(keys), value_bits=tuple(values))
        for row, keys, values in zip(*grids, strict=True)
    )
    return geometry.spread(budgets, None)
