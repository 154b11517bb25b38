"""Eviction: which entries of a KV head stay. One method a file; `METHODS` maps names to classes."""

from typing import Any

from baklava.errors import UserError
from baklava.eviction.base import SHARED, Eviction, Observation, Sample
from baklava.eviction.expected_attention import ExpectedAttention
from baklava.eviction.heavy_hitter import HeavyHitter
from baklava.eviction.key_norm import KeyNorm
from baklava.eviction.keydiff import KeyDiff
from baklava.eviction.kvzip import Reconstruction
from baklava.eviction.snapkv import SnapKV
from baklava.eviction.streaming_llm import Streaming
from baklava.eviction.tova import Tova
from baklava.plan.budget_plan import EvictionChoice

_METHODS = (Streaming, HeavyHitter, Tova, SnapKV, KeyNorm, KeyDiff, ExpectedAttention, Reconstruction)
METHODS: dict[str, type[Eviction]] = {method.name: method for method in _METHODS}

__all__ = [
    "METHODS",
    "Eviction",
    "ExpectedAttention",
    "HeavyHitter",
    "KeyDiff",
    "KeyNorm",
    "Observation",
    "Reconstruction",
    "Sample",
    "SnapKV",
    "Streaming",
    "Tova",
    "eviction_of",
    "method_of",
]


def method_of(name: str) -> type[Eviction]:
    """The class of an eviction method; an unknown name lists the known ones."""
    if name not in METHODS:
        raise UserError(f"unknown eviction method {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def eviction_of(choice: EvictionChoice) -> Eviction:
    """The method that a plan names; raises UserError when the plan's knobs are not the method's."""
    method = method_of(choice.method)
    try:
        knobs: dict[str, Any] = choice.model_dump(include=set(SHARED)) | choice.knobs
        eviction = method(**knobs)
    except TypeError as error:
        raise UserError(
            f"the plan's knobs {choice.knobs} do not fit {choice.method} ({error}); make a new plan"
        ) from None
    if eviction.choice != choice:
        raise UserError(f"the plan says {choice}, but {choice.method} is {eviction.choice}; make a new plan")
    return eviction
