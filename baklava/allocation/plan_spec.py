"""Plan specs: METHOD(param=value,...)[+EVICTION(param=value,...)][@BITS]:BUDGET, and the plans that they name."""

import argparse
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from baklava import allocation, eviction
from baklava.allocation import Allocation, BitPair
from baklava.console import share
from baklava.errors import UserError
from baklava.eviction import Eviction, StreamingLLM
from baklava.plan.budget_plan import Bits, BudgetPlan, ParamValue, full_cache_plan
from baklava.plan.geometry import MIXED_PRECISION_BELOW_BITS, CacheGeometry, ModelIdentity
from baklava.plan.registry import load_plan
from baklava.profiling.profile import Profile, uniform_profile
from baklava.runtime.model_loader import LoadedModel

Method = TypeVar("Method", Allocation, Eviction)

_METHOD = r"(\w+)(?:\(([^()]*)\))?"
_SPEC = re.compile(rf"{_METHOD}(?:\+{_METHOD})?(?:@(\w+))?(?::(.*))?")
_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class PlanSpec:
    """A parsed spec."""

    allocation: Allocation
    eviction: Eviction
    bits: BitPair
    budget: float


def is_plan_spec(text: str) -> bool:
    """Return whether a text is meant as `METHOD:BUDGET`, and not as a path, a registry address or `full`."""
    outside_params = re.sub(r"\([^()]*\)", "", text)
    if outside_params.endswith(".json") or "/" in outside_params or os.path.exists(text):
        return False
    return ":" in outside_params or re.split(r"\W", text)[0] in allocation.METHODS


def parse_spec(text: str) -> PlanSpec:
    """Parse a spec such as `blended(curve_power=0.5)+heavy_hitter(recent_ratio=0.6)@k4v2:0.125`.

    The eviction method defaults to StreamingLLM and the bits to 16, as in the literature. Parameters may be separated
    by semicolons too, for options in which a comma ends an argument.

    Raises:
        UserError: the syntax, a method, a parameter, the bits or the budget is invalid, or the budget is missing.
    """
    match = _SPEC.fullmatch(text.strip())
    if not match:
        raise UserError(
            f"plan {text!r} cannot be parsed; write METHOD:BUDGET or, in full, "
            "METHOD(param=value,param=value)+EVICTION(param=value)@k4v2:BUDGET"
        )
    method, params, eviction_name, eviction_params, bits, budget = match.groups()
    if budget is None:
        raise UserError(f"plan {text!r} names a method without a budget; write {text}:0.3")
    return PlanSpec(
        allocation=_build_method(allocation.method_class(method), params or ""),
        eviction=_build_method(eviction.method_class(eviction_name or StreamingLLM.name), eviction_params or ""),
        bits=parse_bits(bits or "16"),
        budget=_parse_budget(budget, text),
    )


def parse_bits(text: str) -> BitPair:
    """Parse the bits of keys and values from `4` or `k4v2`; raises UserError if they are not supported."""
    match = re.fullmatch(r"(\d+)|k(\d+)v(\d+)", text)
    both, keys, values = match.groups() if match else (None, None, None)
    pair = (int(both or keys or 0), int(both or values or 0))
    if not set(pair) <= set(get_args(Bits)):
        raise UserError(f"bits {text!r} are not supported; write 16, 8, 6, 5, 4, 3 or 2, or both as in k4v2")
    return cast(BitPair, pair)


def _parse_budget(budget: str, text: str) -> float:
    try:
        value = share(budget)
    except argparse.ArgumentTypeError:
        start = text[: len(text) - len(budget)]
        raise UserError(f"budget {budget!r} is not a share of the bytes; write {start}0.3 or {start}30%") from None
    allocation.check_budget(value)
    return value


def _build_method(method: type[Method], text: str) -> Method:
    """Return a method with the parameters of `text`, written name=value,name=value."""
    hints = get_type_hints(method)
    types = {param.name: hints[param.name] for param in fields(method)}
    params: dict[str, Any] = {}
    for assignment in filter(None, map(str.strip, re.split("[,;]", text))):
        name, _, value = (part.strip() for part in assignment.partition("="))
        if name not in types or name in params:
            problem = "is repeated" if name in params else "is unknown"
            raise UserError(
                f"parameter {name!r} of {method.name} {problem}; its parameters are {', '.join(types) or 'none'}"
            )
        params[name] = _parse_value(value, types[name], f"{method.name}({assignment})")
    return method(**params)


def _parse_value(text: str, kind: Any, location: str) -> ParamValue:
    choices = get_args(kind) if get_origin(kind) is Literal else tuple(_BOOLEANS) if kind is bool else ()
    if choices:
        by_name = {str(value): value for value in choices}
        if text not in by_name:
            raise UserError(f"{location}: {text!r} is not one of {', '.join(by_name)}")
        return _BOOLEANS[text] if kind is bool else by_name[text]
    try:
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
    except ValueError:
        raise UserError(f"{location}: {text!r} is not {'an integer' if kind is int else 'a number'}") from None
    return value


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan and the spec or path that named it."""

    name: str
    plan: BudgetPlan


def check_plan(spec: str, identity: ModelIdentity, geometry: CacheGeometry) -> None:
    """Raise UserError if `resolve_plan` would refuse a spec whatever the weights of the model are."""
    if is_plan_spec(spec):
        parse_spec(spec)
    elif spec != "full":
        load_plan(spec).validate_for(identity, geometry)


def resolve_plan(
    spec: str, loaded: LoadedModel, context_length: int, load_profile: Callable[[], Profile] | None = None
) -> ResolvedPlan:
    """Return the plan that a user names.

    That is a file, `models:/NAME@ALIAS` or `models:/NAME/VERSION` in MLflow's registry, `full`, or
    `METHOD(...)[+EVICTION(...)][@BITS]:BUDGET`.

    Args:
        spec: for example `blended(curve_power=0.5)+heavy_hitter@k4v2:0.3`, which keeps heavy hitters, with keys in 4
            bits and values in 2.
        loaded: the model.
        context_length: tokens of a sequence at which the budget holds.
        load_profile: called only if the spec needs a profile.

    Raises:
        UserError: the spec is invalid or needs a profile that is not given, the file is not a plan, or the plan does
            not suit the model.
    """
    if spec == "full":
        return ResolvedPlan(spec, full_cache_plan(loaded.identity, loaded.geometry, context_length))
    if not is_plan_spec(spec):
        plan = load_plan(spec)
        loaded.check_plan(plan)
        return ResolvedPlan(spec, plan)
    parsed = parse_spec(spec)
    # The profile orders the channels of quantized keys and predicts scores, whatever spreads the bytes.
    reads_heads = parsed.bits[0] < MIXED_PRECISION_BELOW_BITS or parsed.eviction.predicted_share > 0
    needs_profile = parsed.allocation.needs_profile or reads_heads
    if needs_profile and load_profile is None:
        raise UserError(f"plan {spec!r} needs a profile; give one, or choose a method without, such as uniform:0.3")
    plan = allocation.allocate(
        load_profile() if needs_profile and load_profile else uniform_profile(loaded.identity, loaded.geometry),
        budget=parsed.budget,
        context_length=context_length,
        method=parsed.allocation,
        eviction=parsed.eviction,
        bits=parsed.bits,
    )
    loaded.check_plan(plan)
    return ResolvedPlan(spec, plan)
