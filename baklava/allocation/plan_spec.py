"""Names of plans: METHOD(knob=value,...)[+EVICTION(knob=value,...)][@BITS]:BUDGET, and what they stand for."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from baklava import allocation, eviction
from baklava.allocation import Allocation, Pair
from baklava.errors import UserError
from baklava.eviction import Eviction, Streaming
from baklava.plan.budget_plan import Bits, BudgetPlan, full_plan
from baklava.plan.byte_accounting import MIXED_PRECISION_BELOW_BITS
from baklava.profiling.profile import Profile, flat_profile
from baklava.runtime.model_loader import LoadedModel

Made = TypeVar("Made", Allocation, Eviction)

_METHOD = r"(\w+)(?:\(([^()]*)\))?"
_SPEC = re.compile(rf"{_METHOD}(?:\+{_METHOD})?(?:@(\w+))?(?::(.*))?")
_BOOLS = {"true": True, "false": False}


@dataclass(frozen=True)
class Spec:
    """What a name stands for; `budget` is None where it has none."""

    method: Allocation
    eviction: Eviction
    bits: Pair
    budget: float | None


def spec_of(text: str) -> Spec:
    """Read a name such as `blended(curve_power=0.5)+heavy_hitter(recent=0.6)@k4v2:0.125`.

    Without an eviction method it is sinks + recent, without bits it is 16, as in the literature. Knobs may be parted by
    semicolons too, where a comma ends an argument.

    Raises:
        UserError: it is written otherwise, or has an unknown method or knob, bits that are not stored, or no number.
    """
    found = _SPEC.fullmatch(text.strip())
    if not found:
        raise UserError(
            f"plan {text!r} cannot be read; write METHOD:BUDGET or, with all that may be said, "
            "METHOD(knob=value,knob=value)+EVICTION(knob=value)@k4v2:BUDGET"
        )
    method, knobs, keeping, keeping_knobs, bits, budget = found.groups()
    return Spec(
        method=_made(allocation.method_of(method), knobs or ""),
        eviction=_made(eviction.method_of(keeping or Streaming.name), keeping_knobs or ""),
        bits=pair_of(bits or "16"),
        budget=None if budget is None else _number(budget, text),
    )


def pair_of(text: str) -> Pair:
    """Bits of keys and of values out of `4` or `k4v2`; raises UserError where they are not ones that are stored."""
    match = re.fullmatch(r"(\d+)|k(\d+)v(\d+)", text)
    both, keys, values = match.groups() if match else (None, None, None)
    pair = (int(both or keys or 0), int(both or values or 0))
    if not set(pair) <= set(get_args(Bits)):
        raise UserError(f"bits {text!r} are not stored; write 16, 8, 6, 5, 4, 3 or 2, or both as in k4v2")
    return cast(Pair, pair)


def bits_name(pair: tuple[int, int]) -> str:
    """How `pair_of` reads these bits: `k4v2`, or `4` where both are equal."""
    return str(pair[0]) if pair[0] == pair[1] else f"k{pair[0]}v{pair[1]}"


def _number(budget: str, text: str) -> float:
    try:
        return float(budget)
    except ValueError:
        raise UserError(
            f"budget {budget!r} is not a number; write {text[: -len(budget)] or text}0.3 for 30 % of the bytes"
        ) from None


def _made(method: type[Made], written: str) -> Made:
    """A method with these knobs, written knob=value,knob=value."""
    types = {knob.name: get_type_hints(method)[knob.name] for knob in fields(method)}
    knobs: dict[str, Any] = {}
    for pair in filter(None, (each.strip() for each in re.split("[,;]", written))):
        name, _, value = (part.strip() for part in pair.partition("="))
        if name not in types or name in knobs:
            wrong = "is given twice" if name in knobs else "is unknown"
            raise UserError(f"knob {name!r} of {method.name} {wrong}; it has {', '.join(types) or 'none'}")
        knobs[name] = _value(value, types[name], f"{method.name}({pair})")
    return method(**knobs)


def _value(text: str, kind: Any, where: str) -> bool | int | float | str:
    """A knob's value in the type of its field."""
    known = get_args(kind) if get_origin(kind) is Literal else tuple(_BOOLS) if kind is bool else ()
    if known:
        named = {str(value): value for value in known}
        if text not in named:
            raise UserError(f"{where}: {text!r} is not one of {', '.join(named)}")
        return _BOOLS[text] if kind is bool else named[text]
    try:
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
    except ValueError:
        raise UserError(f"{where}: {text!r} is not {'a whole number' if kind is int else 'a number'}") from None
    return value


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
    asked = spec.method.profiled or spec.bits[0] < MIXED_PRECISION_BELOW_BITS
    return allocation.allocate(
        profile() if asked else flat_profile(loaded.identity, loaded.geometry),
        budget=spec.budget,
        context_length=context_length,
        method=spec.method,
        eviction=spec.eviction,
        bits=spec.bits,
    )
