"""Sizes that are searched where no budget was given."""

from dataclasses import dataclass
from typing import Any, Literal

import optuna

from baklava.allocation import Allocation, Blended, Greedy, Pair, Shifted, allocate
from baklava.errors import UserError
from baklava.eviction import Eviction, HeavyHitter, Streaming
from baklava.plan.budget_plan import BudgetPlan, Provenance, head_bytes
from baklava.plan.byte_accounting import FULL_BITS, full_bytes, sliding_bytes
from baklava.plan.geometry import CacheGeometry
from baklava.profiling.profile import Profile
from tuning.study.objective import Goal
from tuning.study.settings import BITS, CENTROIDS, BitsName

SMALLEST, LARGEST = 0.02, 0.6
"""Shares of the full cache's bytes: what is worth searching, if a model and its texts leave that much room."""

ROOM = 1.5
"""The smallest size over one in which no entry of a head competes."""


def sizes_of(geometry: CacheGeometry, context_length: int) -> tuple[float, float]:
    """The least and the largest budget to draw: all that is drawn fits into the least, in 16 bits too."""
    choice = HeavyHitter(centroids=max(CENTROIDS)).choice
    heads = len(geometry.budgetable) * geometry.kv_heads
    needed = heads * head_bytes(geometry, choice.minimum_tokens, FULL_BITS, FULL_BITS, choice)
    least = ROOM * (needed + sliding_bytes(geometry, FULL_BITS)) / full_bytes(geometry, context_length)
    smallest = min(1.0, max(SMALLEST, least))
    return smallest, min(1.0, max(LARGEST, 2 * smallest))


Params = dict[str, Any]

GROUP_REDUCTIONS: tuple[Literal["mean", "max"], ...] = ("mean", "max")
ROUNDINGS = (8, 16, 32)

CURVES: BitsName = "curves"

PAIRS: dict[BitsName, Pair] = {
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

RANGES = {
    "reconstruction_power": (0.0, 2.0),
    "importance_power": (0.0, 4.0),
    # Both signs: early layers change the hidden state most, yet late layers may need more entries.
    "layer_power": (-1.0, 1.0),
    "curve_power": (0.0, 2.0),
    "floor": (0.0, 0.5),
}
"""What the knobs of the blend are drawn from."""


@dataclass(frozen=True)
class Space:
    """What a trial draws, which depends on what the profile measured.

    `ranked` and `curved` tell whether it has reconstruction counts and loss curves; `sizes` is the range that budgets
    are drawn from, None where the budget is given.
    """

    bits: tuple[BitsName, ...]
    ranked: bool
    curved: bool
    sizes: tuple[float, float] | None = None

    @classmethod
    def of(cls, profile: Profile, bits: tuple[BitsName, ...], sizes: tuple[float, float] | None) -> "Space":
        """The space for a model with this profile.

        Where there are loss curves, bits that they were not measured in are left out: half of the space asks for them.
        """
        measured = profile.curves.bits if profile.curves else ()
        within = tuple(name for name in bits if PAIRS[name] in measured)
        ranked = "reconstruction" in profile.rankings
        if within:
            return cls(within, ranked, True, sizes)
        return cls(tuple(name for name in bits if name != CURVES) or ("4",), ranked, False, sizes)

    @property
    def powers(self) -> tuple[str, ...]:
        """Knobs of the blend that the profile gives a meaning."""
        missing = {"reconstruction_power": not self.ranked, "curve_power": not self.curved}
        return tuple(name for name in RANGES if not missing.get(name))

    @property
    def allocations(self) -> tuple[str, ...]:
        """Methods of allocation that the profile allows."""
        return (Blended.name, Greedy.name) if self.curved else (Blended.name,)

    def suggest(self, trial: optuna.trial.BaseTrial) -> None:
        """Draw the parameters of one trial; knobs exist only where their method is drawn."""
        if trial.suggest_categorical("allocation", list(self.allocations)) == Blended.name:
            for knob in self.powers:
                trial.suggest_float(knob, *RANGES[knob])
        bits = trial.suggest_categorical("bits", list(self.bits))
        trial.suggest_categorical("rounding", list(ROUNDINGS))
        trial.suggest_categorical("sinks", [1, 4])
        if trial.suggest_categorical("eviction", [HeavyHitter.name, Streaming.name]) == HeavyHitter.name:
            _suggest_heavy_hitter(trial, packed=bits != "16")
        if self.sizes:
            trial.suggest_float("budget", *self.sizes, log=True)

    def distributions(self, params: Params) -> dict[str, optuna.distributions.BaseDistribution]:
        """The distributions that recorded parameters were drawn from."""
        trial = optuna.trial.FixedTrial(params)
        self.suggest(trial)
        return trial.distributions


def _suggest_heavy_hitter(trial: optuna.trial.BaseTrial, packed: bool) -> None:
    trial.suggest_float("recent", 0.2, 0.8)
    trial.suggest_categorical("interval", [8, 16, 32])
    trial.suggest_categorical("group_reduction", list(GROUP_REDUCTIONS))
    trial.suggest_categorical("centroids", list(CENTROIDS))
    if packed:
        trial.suggest_categorical("staged", [False, True])


def evictions() -> tuple[Eviction, ...]:
    """One method per distinct recording that the plans of this space need from a prefill.

    Sinks, the recent share, the interval, bits, staging and centroids change what is cut, not what is recorded.
    """
    return (Streaming(), *(HeavyHitter(reduction=reduction) for reduction in GROUP_REDUCTIONS))


def allocation_of(params: Params) -> Allocation:
    """The allocation that a trial's parameters name, with the shifts of a refinement."""
    base = _greedy(params) if params["allocation"] == Greedy.name else _blended(params)
    return Shifted(of=base, shifts=tuple(map(tuple, params["shifts"]))) if "shifts" in params else base


def eviction_of(params: Params) -> Eviction:
    """The eviction that a trial's parameters name."""
    if params["eviction"] == Streaming.name:
        return Streaming(sinks=params["sinks"])
    knobs = {knob: params[knob] for knob in ("sinks", "recent", "interval", "centroids")}
    return HeavyHitter(**knobs, reduction=params["group_reduction"], staged=params.get("staged", False))


def plan_of(
    params: Params, profile: Profile, *, budget: float | None, context_length: int, provenance: Provenance | None = None
) -> BudgetPlan:
    """The plan of a trial, of its own size if it drew one; raises UserError when that does not hold its knobs."""
    size = params.get("budget", budget)
    if size is None:
        raise UserError("the trial drew no budget and the search was given none; give --budget")
    return allocate(
        profile,
        budget=size,
        context_length=context_length,
        method=allocation_of(params),
        eviction=eviction_of(params),
        bits=PAIRS[params["bits"]],
        step=params["rounding"],
        provenance=provenance,
    )


def _blended(params: Params) -> Blended:
    knobs = {knob: params.get(knob, 0.0) for knob in RANGES}
    return Blended(**knobs, bits="curves" if params["bits"] == CURVES else "given")


def _greedy(params: Params) -> Greedy:
    return Greedy(measure="text", bits="any" if params["bits"] == CURVES else "given")


@dataclass(frozen=True)
class Task:
    """How parameters become a plan, and what it is scored on: `windows` are names, scored in this order.

    Plans store in one of `bits`.
    """

    profile: Profile
    goal: Goal
    context_length: int
    windows: tuple[str, ...]
    bits: tuple[BitsName, ...] = BITS

    @property
    def space(self) -> Space:
        """What trials draw."""
        sizes = sizes_of(self.profile.geometry, self.context_length) if self.goal.draws_budget else None
        return Space.of(self.profile, self.bits, sizes)

    def plan(self, params: Params) -> BudgetPlan:
        """The plan of a trial; raises UserError when the budget does not hold its knobs."""
        return plan_of(params, self.profile, budget=self.goal.budget, context_length=self.context_length)
