"""The heuristics: what is tried before anything is drawn, and what every winner has to beat on validation."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from baklava.allocation import Allocation, Baklava, Blended, Greedy, Pair, ReconstructionCounts, Uniform, allocate
from baklava.eviction import Eviction, HeavyHitter, Streaming
from baklava.plan import BudgetPlan
from baklava.profile import Profile
from tuning.settings import BitsName
from tuning.space import CURVES, PAIRS, Params, Space

SHARPEST = HeavyHitter(reduction="max", power=2, distance=32)
"""The scores that did best of all heavy hitters in every measurement so far."""

LEVELS = 4
"""Sizes, spread over the range, at which the strongest heuristic is tried where sizes are drawn."""


@dataclass(frozen=True)
class Heuristic:
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


def heuristics(space: Space) -> list[Heuristic]:
    """The methods that every winner has to beat, the strongest known among them."""
    narrow, wide = PAIRS[narrow_bits(space)], PAIRS[wide_bits(space)]
    strongest = ReconstructionCounts() if space.ranked else Baklava()
    methods: dict[Allocation, None] = dict.fromkeys((strongest, Baklava(), Uniform()))
    made = [Heuristic(method, SHARPEST, narrow) for method in methods]
    if wide != narrow:
        made.append(Heuristic(strongest, SHARPEST, wide))
    return [*made, *_greedy(space), Heuristic(Uniform(), Streaming(), wide)]


def first_params(space: Space) -> list[Params]:
    """The heuristics as trials, the strongest first: reconstruction counts, greedy, BaKlaVa and uniform.

    In 4 bits and in 16, of one size; where sizes are drawn, the strongest at several and the others at one of them.
    """
    narrow, wide = narrow_bits(space), wide_bits(space)
    blends = _blends(space)
    points = [{**blend, **_stored(bits)} for bits in dict.fromkeys((narrow, wide)) for blend in blends]
    if not space.sizes:
        return points
    levels = [float(level) for level in np.geomspace(*space.sizes, LEVELS + 2)[1:-1]]
    return [{**points[0], "budget": level} for level in levels] + [{**p, "budget": levels[1]} for p in points[1:]]


def narrow_bits(space: Space) -> BitsName:
    """4 bits, of which most measurements speak, or what comes nearest in the space."""
    return min(space.bits, key=lambda name: (name == CURVES, abs(sum(PAIRS[name]) - 8)))


def wide_bits(space: Space) -> BitsName:
    """16 bits, or the most that the space has."""
    return max(space.bits, key=lambda name: sum(PAIRS[name]))


def _blends(space: Space) -> list[Params]:
    """Allocations as points of the space: a blend of one measure each, and greedy."""
    one = {"reconstruction_power": 1.0, "importance_power": 2.0}
    floors = {"importance_power": {"floor": Baklava().floor}}
    measures = [*({name: power, **floors.get(name, {})} for name, power in one.items() if name in space.powers), {}]
    nothing = {"allocation": Blended.name, **dict.fromkeys(space.powers, 0.0)}
    blends: list[Params] = [{**nothing, **measure} for measure in measures]
    return [*blends[:1], *([{"allocation": Greedy.name}] if space.curved else []), *blends[1:]]


def _stored(bits: BitsName) -> Params:
    """The bits and the eviction of the strongest heuristics."""
    packed: dict[str, Any] = {} if bits == "16" else {"staged": SHARPEST.staged}
    shared = {knob: getattr(SHARPEST, knob) for knob in ("sinks", "recent", "interval", "merging")}
    method = {"eviction": SHARPEST.name, "group_reduction": SHARPEST.reduction}
    return {"bits": bits, "rounding": 8, **shared, **method, **packed}


def _greedy(space: Space) -> list[Heuristic]:
    if not space.curved:
        return []
    any_bits = [Heuristic(Greedy(bits="any"), SHARPEST, PAIRS[CURVES])] if CURVES in space.bits else []
    return [Heuristic(Greedy(), SHARPEST, PAIRS[narrow_bits(space)]), *any_bits]
