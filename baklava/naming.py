"""Plans by name: a file, `full`, or METHOD[+EVICTION][@BITS]:BUDGET."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from baklava import allocation, eviction
from baklava.errors import UserError
from baklava.model import LoadedModel
from baklava.plan import Bits, BudgetPlan, full_plan
from baklava.profile import Profile, flat_profile


@dataclass(frozen=True)
class NamedPlan:
    """A plan under the name that the user gave it by."""

    name: str
    plan: BudgetPlan


def named_plan(spec: str, loaded: LoadedModel, context_length: int, profile: Callable[[], Profile]) -> NamedPlan:
    """The plan that a user names: a file, `full`, or METHOD[+EVICTION][@BITS]:BUDGET.

    `baklava+heavy_hitter@k4v2:0.3` keeps heavy hitters, keys in 4 bits, values in 2. Without an eviction method it is
    sinks + recent, without bits it is 16, as in the literature. `profile` is called only where needed.

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
    methods, _, bits = method.partition("@")
    spreading, _, keeping = methods.partition("+")
    spread = allocation.method_of(spreading)()
    keep = eviction.method_of(keeping or eviction.Streaming.name)()
    try:
        share = float(budget)
    except ValueError:
        raise UserError(f"budget {budget!r} is not a number; write {method}:0.3 for 30 % of the bytes") from None
    measured = profile() if spread.profiled else flat_profile(loaded.identity, loaded.geometry)
    return allocation.allocate(
        measured, budget=share, context_length=context_length, method=spread, eviction=keep, bits=pair_of(bits or "16")
    )


def pair_of(text: str) -> allocation.Pair:
    """Bits of keys and of values out of `4` or `k4v2`; raises UserError where they are not ones that are stored."""
    match = re.fullmatch(r"(\d+)|k(\d+)v(\d+)", text)
    both, keys, values = match.groups() if match else (None, None, None)
    pair = (int(both or keys or 0), int(both or values or 0))
    if not set(pair) <= set(get_args(Bits)):
        raise UserError(f"bits {text!r} are not stored; write 16, 8, 4, 3 or 2, or keys and values apart as in k4v2")
    return cast(allocation.Pair, pair)


def bits_name(pair: tuple[int, int]) -> str:
    """How `pair_of` reads these bits: `k4v2`, or `4` where both are equal."""
    return str(pair[0]) if pair[0] == pair[1] else f"k{pair[0]}v{pair[1]}"
