"""Plans by name: a file, `full`, or METHOD[+EVICTION]:BUDGET."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from baklava import allocation, eviction
from baklava.errors import UserError
from baklava.model import LoadedModel
from baklava.plan import BudgetPlan, full_plan
from baklava.profile import Profile, flat_profile


@dataclass(frozen=True)
class NamedPlan:
    """A plan under the name that the user gave it by."""

    name: str
    plan: BudgetPlan


def named_plan(spec: str, loaded: LoadedModel, context_length: int, profile: Callable[[], Profile]) -> NamedPlan:
    """The plan that a user names: a file, `full`, or METHOD[+EVICTION]:BUDGET such as baklava+heavy_hitter:0.3.

    Without an eviction method it is sinks + recent, as in the literature. `profile` is called only where needed.

    Raises:
        UserError: none of these, an unknown method, a bad budget, or a plan for another model.
    """
    if spec == "full":
        return NamedPlan(spec, full_plan(loaded.identity, loaded.geometry, context_length))
    if ":" in spec and not Path(spec).exists():
        return NamedPlan(spec, _allocated(spec, loaded, context_length, profile))
    if spec.partition("+")[0] in allocation.METHODS:
        raise UserError(f"plan {spec!r} names a method without a budget; write {spec}:0.3")
    plan = BudgetPlan.read(spec)
    plan.check_fits(loaded.identity, loaded.geometry)
    return NamedPlan(spec, plan)


def _allocated(spec: str, loaded: LoadedModel, context_length: int, profile: Callable[[], Profile]) -> BudgetPlan:
    method, _, budget = spec.partition(":")
    spreading, _, keeping = method.partition("+")
    spread = allocation.method_of(spreading)()
    keep = eviction.method_of(keeping or eviction.Streaming.name)()
    try:
        share = float(budget)
    except ValueError:
        raise UserError(f"budget {budget!r} is not a number; write {method}:0.3 for 30 % of the bytes") from None
    measured = profile() if spread.profiled else flat_profile(loaded.identity, loaded.geometry)
    return allocation.allocate(measured, budget=share, context_length=context_length, method=spread, eviction=keep)
