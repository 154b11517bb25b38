"""Plans by name: a file, `full`, or METHOD(knob=value,...)[+EVICTION(knob=value,...)][@BITS]:BUDGET."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from baklava import allocation
from baklava.errors import UserError
from baklava.grades import GRADED
from baklava.model import LoadedModel
from baklava.plan import BudgetPlan, full_plan
from baklava.profile import Profile, flat_profile
from baklava.specs import spec_of


@dataclass(frozen=True)
class NamedPlan:
    """A plan under the name that the user gave it by."""

    name: str
    plan: BudgetPlan


def named_plan(spec: str, loaded: LoadedModel, context_length: int, profile: Callable[[], Profile]) -> NamedPlan:
    """The plan that a user names: a file, `full`, or METHOD(knob=value,...)[+EVICTION(knob=value,...)][@BITS]:BUDGET.

    `blended(curve_power=0.5)+heavy_hitter@k4v2:0.3` keeps heavy hitters, keys in 4 bits, values in 2. `profile` is
    called only where needed.

    Raises:
        UserError: none of these, an unknown method or knob, a bad budget, or a plan for another model.
    """
    if spec == "full":
        return NamedPlan(spec, full_plan(loaded.identity, loaded.geometry, context_length))
    named = re.split(r"\W", spec)[0] in allocation.METHODS
    if (":" in spec or named) and not Path(spec).exists():
        return NamedPlan(spec, _allocated(spec, loaded, context_length, profile))
    plan = BudgetPlan.read(spec)
    plan.check_fits(loaded.identity, loaded.geometry)
    return NamedPlan(spec, plan)


def _allocated(text: str, loaded: LoadedModel, context_length: int, profile: Callable[[], Profile]) -> BudgetPlan:
    spec = spec_of(text)
    if spec.budget is None:
        raise UserError(f"plan {text!r} names a method without a budget; write {text}:0.3")
    # Packed keys are graded by what the profile says of their channels, whatever spreads the bytes.
    asked = spec.method.profiled or spec.bits[0] < GRADED
    return allocation.allocate(
        profile() if asked else flat_profile(loaded.identity, loaded.geometry),
        budget=spec.budget,
        context_length=context_length,
        method=spec.method,
        eviction=spec.eviction,
        bits=spec.bits,
    )
