"""The search space: which parameters a trial samples, and how they become a plan."""

from dataclasses import dataclass
from typing import Any, Literal

import optuna

from baklava.allocation import Allocation, BitPair, Blended, Greedy, Perturbed, allocate
from baklava.errors import UserError
from baklava.eviction import AttentionMatching, Eviction, HeavyHitter, StreamingLLM
from baklava.plan.budget_plan import BudgetPlan, PrefillConfig, head_bytes
from baklava.plan.geometry import FULL_BITS, CacheGeometry, full_cache_bytes, unbudgeted_bytes
from baklava.profiling.profile import Profile
from tuning.study.objective import Goal
from tuning.study.settings import ALL_BITS, CENTROID_CHOICES, INTERVAL_CHOICES, RESIDUAL_LENGTHS, BitsName

Params = dict[str, Any]

GROUP_REDUCTIONS: tuple[Literal["mean", "max"], ...] = ("mean", "max")
ROUNDINGS = (8, 16, 32)
REFERENCE_COUNTS = (256, 1024)
RIDGE_RANGE = (1.0, 100.0)

FIT_REFERENCES = 256
"""References to which values are fitted; more take longer and gain little."""

CURVES: BitsName = "curves"

BIT_PAIRS: dict[BitsName, BitPair] = {
    "16": (16, 16),
    "8": (8, 8),
    "k8v4": (8, 4),
    "k6v5": (6, 5),
    "k6v4": (6, 4),
    "k5v4": (5, 4),
    "4": (4, 4),
    "k4v3": (4, 3),
    "k4v2": (4, 2),
    "3": (3, 3),
    "k3v2": (3, 2),
    "2": (2, 2),
    CURVES: (5, 4),
}
"""Bits of keys and values by name; "curves" starts from a pair and gives each head its own by its loss curves."""

BLEND_RANGES = {
    "reconstruction_power": (0.0, 2.0),
    "importance_power": (0.0, 4.0),
    # Both signs: early layers change the hidden state most, yet late layers may need more entries.
    "layer_power": (-1.0, 1.0),
    "curve_power": (0.0, 2.0),
    "floor": (0.0, 0.5),
}
"""Ranges that the parameters of the blended allocation are sampled from."""

MIN_BUDGET, MAX_BUDGET = 0.02, 0.6
"""The usual range of sampled budgets, as shares of the full cache's bytes; `budget_range_for` adapts it to a model."""

MIN_BUDGET_SLACK = 1.5
"""Smallest sampled budget over the bytes of the minimum entries of every head."""


def budget_range_for(geometry: CacheGeometry, context_length: int) -> tuple[float, float]:
    """Return the smallest and the largest budget to sample: every plan of the space fits even into the smallest."""
    eviction = HeavyHitter(centroids=max(CENTROID_CHOICES)).config
    heads = len(geometry.full_attention_layers) * geometry.kv_heads
    min_bytes = heads * head_bytes(geometry, eviction.min_tokens, FULL_BITS, FULL_BITS, eviction)
    fixed = unbudgeted_bytes(geometry, FULL_BITS, context_length)
    smallest = (fixed + MIN_BUDGET_SLACK * min_bytes) / full_cache_bytes(geometry, context_length)
    smallest = min(1.0, max(MIN_BUDGET, smallest))
    return smallest, min(1.0, max(MAX_BUDGET, 2 * smallest))


@dataclass(frozen=True)
class SearchSpace:
    """The parameters that a trial samples, which depend on what the profile measured.

    `has_reconstruction` and `has_loss_curves` say whether the profile has those measurements, and `moves_queries`
    whether the model's queries can be moved. Budgets are sampled from `budget_range`, which is None if the budget is
    fixed.
    """

    bits: tuple[BitsName, ...]
    has_reconstruction: bool
    has_loss_curves: bool
    moves_queries: bool = True
    budget_range: tuple[float, float] | None = None

    @classmethod
    def for_profile(
        cls, profile: Profile, bits: tuple[BitsName, ...], budget_range: tuple[float, float] | None
    ) -> "SearchSpace":
        """Return the space for a model with this profile.

        If there are loss curves, leave out the bits that they were not measured in, since half of the space uses them.
        """
        measured = profile.curves.bits if profile.curves else ()
        with_curves = tuple(name for name in bits if BIT_PAIRS[name] in measured)
        has_reconstruction = "reconstruction" in profile.rankings
        if with_curves:
            return cls(with_curves, has_reconstruction, True, profile.moves_queries, budget_range)
        without_curves = tuple(name for name in bits if name != CURVES)
        return cls(without_curves or ("4",), has_reconstruction, False, profile.moves_queries, budget_range)

    @property
    def blend_params(self) -> tuple[str, ...]:
        """Parameters of the blended allocation that the profile gives a meaning."""
        missing = {"reconstruction_power": not self.has_reconstruction, "curve_power": not self.has_loss_curves}
        return tuple(name for name in BLEND_RANGES if not missing.get(name))

    @property
    def evictions(self) -> tuple[str, ...]:
        """Names of the eviction methods, the best first."""
        names = (AttentionMatching.name, HeavyHitter.name, StreamingLLM.name)
        return names if self.moves_queries else names[1:]

    def suggest(self, trial: optuna.trial.BaseTrial) -> None:
        """Sample the parameters of one trial; those of a method exist only if that method is sampled."""
        allocations = [Blended.name, Greedy.name] if self.has_loss_curves else [Blended.name]
        if trial.suggest_categorical("allocation", allocations) == Blended.name:
            for name in self.blend_params:
                trial.suggest_float(name, *BLEND_RANGES[name])
        bits = trial.suggest_categorical("bits", list(self.bits))
        trial.suggest_categorical("rounding", list(ROUNDINGS))
        trial.suggest_categorical("sinks", [1, 4])
        eviction = trial.suggest_categorical("eviction", list(self.evictions))
        if eviction == AttentionMatching.name:
            trial.suggest_categorical("references", list(REFERENCE_COUNTS))
            trial.suggest_float("ridge", *RIDGE_RANGE, log=True)
        elif eviction == HeavyHitter.name:
            trial.suggest_categorical("group_reduction", list(GROUP_REDUCTIONS))
        if eviction != StreamingLLM.name:
            trial.suggest_float("recent", 0.2, 0.8)
            trial.suggest_categorical("interval", list(INTERVAL_CHOICES))
            trial.suggest_categorical("centroids", list(CENTROID_CHOICES))
            if bits != "16":
                trial.suggest_categorical("residual", list(RESIDUAL_LENGTHS))
        if self.budget_range:
            trial.suggest_float("budget", *self.budget_range, log=True)

    def distributions(self, params: Params) -> dict[str, optuna.distributions.BaseDistribution]:
        """Return the distributions that recorded parameters were sampled from."""
        trial = optuna.trial.FixedTrial(params)
        self.suggest(trial)
        return trial.distributions


def recorded_evictions(moves_queries: bool) -> tuple[Eviction, ...]:
    """Return one eviction method per distinct recording that the plans of this space need from a prefill.

    Sinks, recent ratio, interval, bits, residual, centroids and ridge change what is evicted, not what is recorded.

    Args:
        moves_queries: Whether the model's queries can be moved.
    """
    methods = (StreamingLLM(), *(HeavyHitter(reduction=reduction) for reduction in GROUP_REDUCTIONS))
    if not moves_queries:
        return methods
    return (*methods, *(AttentionMatching(references=n, fit_references=FIT_REFERENCES) for n in REFERENCE_COUNTS))


def allocation_from_params(params: Params) -> Allocation:
    """Return the allocation method of a trial, with the shifts of the local search."""
    base: Allocation
    if params["allocation"] == Greedy.name:
        base = Greedy(measure="text", bits="any" if params["bits"] == CURVES else "fixed")
    else:
        blend = {name: params.get(name, 0.0) for name in BLEND_RANGES}
        base = Blended(**blend, bits="curves" if params["bits"] == CURVES else "fixed")
    return Perturbed(base=base, log2_factors=tuple(map(tuple, params["shifts"]))) if "shifts" in params else base


def eviction_from_params(params: Params) -> Eviction:
    """Return the eviction method of a trial."""
    if params["eviction"] == StreamingLLM.name:
        return StreamingLLM(sinks=params["sinks"])
    shared = {
        "sinks": params["sinks"],
        "recent_ratio": params["recent"],
        "eviction_interval": params["interval"],
        "centroids": params["centroids"],
        "residual_length": params.get("residual", 0),
    }
    if params["eviction"] == HeavyHitter.name:
        return HeavyHitter(**shared, reduction=params["group_reduction"])
    fit = {"fit_references": FIT_REFERENCES, "fit_ridge": params["ridge"]}
    return AttentionMatching(**shared, **fit, references=params["references"])


@dataclass(frozen=True)
class SearchTask:
    """How parameters become a plan, and what plans are scored on.

    `windows` are names, in the order of scoring; plans store in one of `bits`, and process prompts as `prefill` says.
    """

    profile: Profile
    goal: Goal
    context_length: int
    windows: tuple[str, ...]
    bits: tuple[BitsName, ...] = ALL_BITS
    prefill: PrefillConfig | None = None

    @property
    def space(self) -> SearchSpace:
        """The space that trials sample."""
        budgets = budget_range_for(self.profile.geometry, self.context_length) if self.goal.samples_budget else None
        return SearchSpace.for_profile(self.profile, self.bits, budgets)

    def plan(self, params: Params) -> BudgetPlan:
        """Return the plan of a trial, of its own size if it sampled one.

        Raises:
            UserError: the budget is too small for a plan with these parameters.
        """
        budget = params.get("budget", self.goal.budget)
        if budget is None:
            raise UserError("the trial sampled no budget and the search has none; give --budget")
        return allocate(
            self.profile,
            budget=budget,
            context_length=self.context_length,
            method=allocation_from_params(params),
            eviction=eviction_from_params(params),
            bits=BIT_PAIRS[params["bits"]],
            step=params["rounding"],
            prefill=self.prefill,
        )
