"""The search space: where the entries go (allocation) and which entries stay (eviction), as flat parameters."""

from collections.abc import Sequence
from itertools import product
from typing import Any, Literal

import optuna

from baklava.allocation import Allocation, Baklava, Uniform, allocate
from baklava.eviction import Eviction, HeavyHitter, Streaming
from baklava.plan import BudgetPlan, Provenance
from baklava.profile import Profile

Params = dict[str, Any]

GROUP_REDUCTIONS: tuple[Literal["mean", "max"], ...] = ("mean", "max")
POWERS: tuple[Literal[1, 2], ...] = (1, 2)
DISTANCES = (0, 32)


def suggest(trial: optuna.trial.BaseTrial, sources: Sequence[str]) -> None:
    """Draw the parameters of one trial; the heavy-hitter knobs exist only where that method is drawn.

    `sources` are the head inputs that the model's profile compares with.
    """
    trial.suggest_float("importance_power", 0.0, 4.0)
    # Both signs: early layers change the hidden state most, yet late layers may need more entries.
    trial.suggest_float("layer_power", -1.0, 1.0)
    trial.suggest_float("floor", 0.02, 0.5)
    trial.suggest_categorical("source", list(sources))
    # "sum" is "mean" times a constant within one model, so it would be drawn twice.
    trial.suggest_categorical("reduction", ["mean", "max"])
    trial.suggest_categorical("sinks", [1, 4, 16])
    if trial.suggest_categorical("eviction", [HeavyHitter.name, Streaming.name]) == HeavyHitter.name:
        trial.suggest_float("recent", 0.2, 0.8)
        trial.suggest_categorical("interval", [16, 32, 64])
        trial.suggest_categorical("group_reduction", list(GROUP_REDUCTIONS))
        trial.suggest_categorical("power", list(POWERS))
        trial.suggest_categorical("distance", list(DISTANCES))


def evictions() -> tuple[Eviction, ...]:
    """One method per distinct recording that the plans of this space need from a prefill."""
    knobs = product(GROUP_REDUCTIONS, POWERS, DISTANCES)
    return (Streaming(), *(HeavyHitter(reduction=r, power=p, distance=d) for r, p, d in knobs))


def first_params() -> list[Params]:
    """The heuristics as trials, tried before anything is drawn: BaKlaVa with three evictions, and near-uniform."""
    baklava = _allocation_params(Baklava())
    heavy, streaming = _eviction_params(HeavyHitter()), _eviction_params(Streaming())
    far = _eviction_params(HeavyHitter(reduction="max", power=2, distance=32))
    uniform = {**baklava, "importance_power": 0.0}
    return [{**baklava, **heavy}, {**baklava, **far}, {**baklava, **streaming}, {**uniform, **heavy}]


def heuristics() -> dict[str, tuple[Allocation, Eviction]]:
    """The methods that every winner has to beat on validation, by name."""
    pairs = product((Uniform(), Baklava()), (Streaming(), HeavyHitter()))
    return {f"{allocation.name} + {eviction.name}": (allocation, eviction) for allocation, eviction in pairs}


def methods_of(params: Params) -> tuple[Allocation, Eviction]:
    """The methods that a trial's parameters name."""
    allocation = Baklava(**{knob: params[knob] for knob in _BAKLAVA_KNOBS})
    if params["eviction"] == Streaming.name:
        return allocation, Streaming(sinks=params["sinks"])
    knobs = {knob: params[knob] for knob in ("sinks", "recent", "interval", "power", "distance")}
    return allocation, HeavyHitter(**knobs, reduction=params["group_reduction"])


def plan_of(
    params: Params, profile: Profile, *, budget: float, context_length: int, provenance: Provenance | None = None
) -> BudgetPlan:
    """The plan of a trial; raises UserError when the budget does not hold its knobs."""
    allocation, eviction = methods_of(params)
    return allocate(
        profile,
        budget=budget,
        context_length=context_length,
        method=allocation,
        eviction=eviction,
        provenance=provenance,
    )


def distributions_of(params: Params, sources: Sequence[str]) -> dict[str, optuna.distributions.BaseDistribution]:
    """The distributions that recorded parameters were drawn from."""
    trial = optuna.trial.FixedTrial(params)
    suggest(trial, sources)
    return trial.distributions


_BAKLAVA_KNOBS = ("importance_power", "layer_power", "floor", "source", "reduction")


def _allocation_params(method: Baklava) -> Params:
    return {knob: getattr(method, knob) for knob in _BAKLAVA_KNOBS}


def _eviction_params(method: Eviction) -> Params:
    params = {"eviction": method.name, "sinks": method.sinks}
    if not isinstance(method, HeavyHitter):
        return params
    scoring = {"group_reduction": method.reduction, "power": method.power, "distance": method.distance}
    return {**params, "recent": method.recent, "interval": method.interval, **scoring}
