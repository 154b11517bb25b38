"""The heuristics: what is tried before anything is drawn, and what every winner has to beat on validation."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from baklava.allocation import Allocation, Baklava, Blended, Greedy, Pair, ReconstructionCounts, Uniform, allocate
from baklava.eviction import Eviction, HeavyHitter, Streaming
from baklava.plan.budget_plan import BudgetPlan
from baklava.profiling.profile import Profile
from tuning.study.search_space import CURVES, BIT_PAIRS, Params, SearchSpace
from tuning.study.settings import BitsName

BEST_HEAVY_HITTER = HeavyHitter(reduction="max", power=2, distance=32, centroids=4)
"""The scores that did best of all heavy hitters in every measurement so far, and what they evict in four centroids."""

DEFAULT_BLEND = Blended(reconstruction_power=0.3, importance_power=0.3, curve_power=0.7, floor=0.3, bits="curves")
"""Mostly what the loss curves say, held back by reconstruction, importance and a floor from believing them too much."""

NUM_BUDGET_LEVELS = 4
"""Sizes, spread over the range, at which the strongest heuristic is tried where sizes are drawn."""


@dataclass(frozen=True)
class BaselineMethod:
    """A plan that needs no search: a method of allocation, one of eviction, and the bits of keys and values."""

    allocation: Allocation
    eviction: Eviction
    bits: Pair

    @property
    def name(self) -> str:
        """What it is called in tables."""
        keys, values = self.bits
        any_bits = self.allocation.knobs.get("bits", "given") != "given"
        bits = "any bits" if any_bits else f"{keys} bits" if keys == values else f"{keys} and {values} bits"
        return f"{self.allocation.name} + {self.eviction.name}, {bits}"

    def plan(self, profile: Profile, budget: float, context_length: int) -> BudgetPlan:
        """Its plan inside a budget; raises UserError when it does not fit."""
        return allocate(
            profile,
            budget=budget,
            context_length=context_length,
            method=self.allocation,
            eviction=self.eviction,
            bits=self.bits,
        )


def baseline_methods(space: SearchSpace) -> list[BaselineMethod]:
    """The methods that every winner has to beat, the strongest known first."""
    narrow, wide = BIT_PAIRS[narrow_bits(space)], BIT_PAIRS[wide_bits(space)]
    counts = ReconstructionCounts() if space.ranked else Baklava()
    made = [BaselineMethod(DEFAULT_BLEND, BEST_HEAVY_HITTER, BIT_PAIRS[CURVES])] if _whole(space) else []
    methods: dict[Allocation, None] = dict.fromkeys((counts, Baklava()))
    made += [BaselineMethod(method, BEST_HEAVY_HITTER, narrow) for method in methods]
    return [*made, *_greedy(space), BaselineMethod(Uniform(), Streaming(), wide)]


def initial_params(space: SearchSpace) -> list[Params]:
    """The heuristics as trials, the strongest first: blends in the bits of the curves, then one measure in 4 bits.

    Where sizes are drawn, the strongest is tried at several and the others at one of them.
    """
    points = [*_balanced(space), *({**blend, **_stored(narrow_bits(space))} for blend in _blends(space))]
    if not space.sizes:
        return points
    levels = [float(level) for level in np.geomspace(*space.sizes, NUM_BUDGET_LEVELS + 2)[1:-1]]
    return [{**points[0], "budget": level} for level in levels] + [{**p, "budget": levels[1]} for p in points[1:]]


def _whole(space: SearchSpace) -> bool:
    """Whether the strongest heuristic is in the space: it asks for every measure and for the bits of the curves."""
    return CURVES in space.bits and space.ranked and space.curved


def _balanced(space: SearchSpace) -> list[Params]:
    """The strongest heuristics: two blends and greedy, with one sink, since sinks stay in 16 bits."""
    if not _whole(space):
        return []
    stored = {**_stored(CURVES), "sinks": 1}
    blend = {"allocation": Blended.name, **{knob: getattr(DEFAULT_BLEND, knob) for knob in space.powers}, **stored}
    halves = {"reconstruction_power": 0.5, "importance_power": 0.5, "curve_power": 0.5}
    return [blend, {**blend, **halves}, {"allocation": Greedy.name, **stored}]


def narrow_bits(space: SearchSpace) -> BitsName:
    """4 bits, of which most measurements speak, or what comes nearest in the space."""
    return min(space.bits, key=lambda name: (name == CURVES, abs(sum(BIT_PAIRS[name]) - 8)))


def wide_bits(space: SearchSpace) -> BitsName:
    """16 bits, or the most that the space has."""
    return max(space.bits, key=lambda name: sum(BIT_PAIRS[name]))


def _blends(space: SearchSpace) -> list[Params]:
    """Allocations as points of the space: a blend of one measure each, and greedy."""
    one = {"reconstruction_power": 1.0, "importance_power": 2.0}
    floors = {"importance_power": {"floor": Baklava().floor}}
    measures = [*({name: power, **floors.get(name, {})} for name, power in one.items() if name in space.powers), {}]
    nothing = {"allocation": Blended.name, **dict.fromkeys(space.powers, 0.0)}
    blends: list[Params] = [{**nothing, **measure} for measure in measures]
    return [*blends[:1], *([{"allocation": Greedy.name}] if space.curved else []), *blends[1:]]


def _stored(bits: BitsName) -> Params:
    """The bits and the eviction of the strongest heuristics."""
    packed: dict[str, Any] = {} if bits == "16" else {"staged": BEST_HEAVY_HITTER.staged}
    shared = {knob: getattr(BEST_HEAVY_HITTER, knob) for knob in ("sinks", "recent", "interval", "centroids")}
    method = {"eviction": BEST_HEAVY_HITTER.name, "group_reduction": BEST_HEAVY_HITTER.reduction}
    return {"bits": bits, "rounding": 8, **shared, **method, **packed}


def _greedy(space: SearchSpace) -> list[BaselineMethod]:
    if not space.curved:
        return []
    if CURVES in space.bits:
        return [BaselineMethod(Greedy(measure="text", bits="any"), BEST_HEAVY_HITTER, BIT_PAIRS[CURVES])]
    return [BaselineMethod(Greedy(measure="text"), BEST_HEAVY_HITTER, BIT_PAIRS[narrow_bits(space)])]
