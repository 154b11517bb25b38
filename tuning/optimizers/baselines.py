"""Baseline methods: tried before anything is sampled, and what every winner has to beat on validation."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from baklava.allocation import Allocation, Baklava, BitPair, Blended, Greedy, ReconstructionCounts, Uniform, allocate
from baklava.eviction import AttentionMatching, Eviction, HeavyHitter, StreamingLLM
from baklava.plan.budget_plan import BudgetPlan, PrefillConfig
from baklava.profiling.profile import Profile
from tuning.study.search_space import BIT_PAIRS, CURVES, FIT_REFERENCES, REFERENCE_COUNTS, Params, SearchSpace
from tuning.study.settings import BitsName

BEST_SHARED_PARAMS: dict[str, Any] = {"centroids": 4, "eviction_interval": 8, "residual_length": 16}
"""The newest tokens get most attention, so they stay in 16 bits; they are few, since evictions are frequent."""

BEST_HEAVY_HITTER = HeavyHitter(**BEST_SHARED_PARAMS)
"""The best heavy-hitter scores in every measurement so far."""

BEST_MATCHING = AttentionMatching(**BEST_SHARED_PARAMS, fit_references=FIT_REFERENCES)
"""The best eviction method in every measurement so far (docs/lab-notes.md), if a model's queries can be moved."""

DEFAULT_BLEND = Blended(reconstruction_power=0.3, importance_power=0.3, curve_power=0.7, floor=0.3, bits="curves")
"""Mostly the loss curves, tempered by reconstruction counts, importance and a floor."""

NUM_BUDGET_LEVELS = 4
"""Sizes, spread over the range, at which the strongest baseline is tried if sizes are sampled."""


@dataclass(frozen=True)
class BaselineMethod:
    """A plan that needs no search: an allocation method, an eviction method, and the bits of keys and values."""

    allocation: Allocation
    eviction: Eviction
    bits: BitPair

    @property
    def name(self) -> str:
        """Its name in tables."""
        keys, values = self.bits
        any_bits = self.allocation.params.get("bits", "fixed") != "fixed"
        bits = "any bits" if any_bits else f"{keys} bits" if keys == values else f"{keys} and {values} bits"
        return f"{self.allocation.name} + {self.eviction.name}, {bits}"

    def plan(
        self, profile: Profile, budget: float, context_length: int, prefill: PrefillConfig | None = None
    ) -> BudgetPlan:
        """Return its plan for a budget; raise UserError if the budget is too small."""
        return allocate(
            profile,
            budget=budget,
            context_length=context_length,
            method=self.allocation,
            eviction=self.eviction,
            bits=self.bits,
            prefill=prefill,
        )


def baseline_methods(space: SearchSpace) -> list[BaselineMethod]:
    """Return the methods that every winner has to beat, the strongest known first."""
    narrow, wide, best = BIT_PAIRS[_narrow_bits(space)], BIT_PAIRS[_wide_bits(space)], _best_eviction(space)
    methods = []
    if _supports_default_blend(space):
        methods.append(BaselineMethod(DEFAULT_BLEND, best, BIT_PAIRS[CURVES]))
    if space.has_reconstruction:
        methods.append(BaselineMethod(ReconstructionCounts(), best, narrow))
    methods.append(BaselineMethod(Baklava(), BEST_HEAVY_HITTER, narrow))
    if space.has_loss_curves and CURVES in space.bits:
        methods.append(BaselineMethod(Greedy(measure="text", bits="any"), best, BIT_PAIRS[CURVES]))
        if space.moves_queries:
            methods.append(BaselineMethod(Greedy(measure="text", bits="any"), BEST_HEAVY_HITTER, BIT_PAIRS[CURVES]))
    elif space.has_loss_curves:
        methods.append(BaselineMethod(Greedy(measure="text"), best, narrow))
    methods.append(BaselineMethod(Uniform(), StreamingLLM(), wide))
    return methods


def initial_params(space: SearchSpace) -> list[Params]:
    """Return the baselines as trials: first blends in the bits of the curves, then single measures in 4 bits.

    If sizes are sampled, the strongest is tried at several and each of the others at one of them.
    """
    narrow = _shared_params(space, _narrow_bits(space))
    trials = [*_strongest(space), *({**allocation, **narrow} for allocation in _single_measures(space))]
    if not space.budget_range:
        return trials
    levels = [float(level) for level in np.geomspace(*space.budget_range, NUM_BUDGET_LEVELS + 2)[1:-1]]
    return [{**trials[0], "budget": level} for level in levels] + [{**p, "budget": levels[1]} for p in trials[1:]]


def _strongest(space: SearchSpace) -> list[Params]:
    """Blends and greedy, with one sink, since sinks stay in 16 bits.

    Budgets below a twentieth lose from newest tokens in 16 bits and gain from more references: two blends are for them.
    """
    if not _supports_default_blend(space):
        return []
    shared = {**_shared_params(space, CURVES), "sinks": 1}
    blend = {
        "allocation": Blended.name,
        **{name: getattr(DEFAULT_BLEND, name) for name in space.blend_params},
        **shared,
    }
    small = {**blend, "residual": 0}
    if "references" in small:
        small["references"] = max(REFERENCE_COUNTS)
    halves = {"reconstruction_power": 0.5, "importance_power": 0.5, "curve_power": 0.5}
    return [{**blend, "residual": 8}, small, {**small, **halves}, {"allocation": Greedy.name, **shared}]


def _single_measures(space: SearchSpace) -> list[Params]:
    """Allocations by one measure: reconstruction counts, greedy, importance, and none."""
    zeros = {"allocation": Blended.name, **dict.fromkeys(space.blend_params, 0.0)}
    allocations: list[Params] = []
    if space.has_reconstruction:
        allocations.append({**zeros, "reconstruction_power": 1.0})
    allocations.append({**zeros, "importance_power": 2.0, "floor": Baklava().floor})
    allocations.append(zeros)
    if space.has_loss_curves:
        allocations.insert(1, {"allocation": Greedy.name})
    return allocations


def _best_eviction(space: SearchSpace) -> HeavyHitter | AttentionMatching:
    return BEST_MATCHING if space.moves_queries else BEST_HEAVY_HITTER


def _shared_params(space: SearchSpace, bits: BitsName) -> Params:
    """The bits, and the eviction of the strongest baselines."""
    best = _best_eviction(space)
    params: Params = {
        "bits": bits,
        "rounding": 8,
        "sinks": best.sinks,
        "recent": best.recent_ratio,
        "interval": best.eviction_interval,
        "centroids": best.centroids,
        "eviction": best.name,
    }
    if isinstance(best, AttentionMatching):
        params |= {"references": best.references, "ridge": best.fit_ridge}
    else:
        params["group_reduction"] = best.reduction
    return params if bits == "16" else {**params, "residual": best.residual_length}


def _supports_default_blend(space: SearchSpace) -> bool:
    return CURVES in space.bits and space.has_reconstruction and space.has_loss_curves


def _narrow_bits(space: SearchSpace) -> BitsName:
    """4 bits, which most measurements are about, or the nearest in the space."""
    return min(space.bits, key=lambda name: (name == CURVES, abs(sum(BIT_PAIRS[name]) - 8)))


def _wide_bits(space: SearchSpace) -> BitsName:
    """16 bits, or the widest in the space."""
    return max(space.bits, key=lambda name: sum(BIT_PAIRS[name]))
