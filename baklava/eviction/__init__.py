"""Eviction: which entries of a KV head stay. `METHODS` maps names to classes."""

from functools import lru_cache
from typing import Any

from baklava.errors import UserError
from baklava.eviction.attention_based import (
    TOVA,
    AttentionMatching,
    ExpectedAttention,
    HeavyHitter,
    KVzap,
    KVzip,
    SnapKV,
)
from baklava.eviction.attention_free import KeyDiff, KeyNorm, StreamingLLM
from baklava.eviction.base import SHARED_PARAMS, Eviction, Observation, QuerySample
from baklava.plan.budget_plan import EvictionConfig

_METHODS = (
    StreamingLLM,
    HeavyHitter,
    TOVA,
    SnapKV,
    KeyNorm,
    KeyDiff,
    ExpectedAttention,
    KVzip,
    AttentionMatching,
    KVzap,
)
METHODS: dict[str, type[Eviction]] = {method.name: method for method in _METHODS}

__all__ = [
    "METHODS",
    "TOVA",
    "AttentionMatching",
    "Eviction",
    "ExpectedAttention",
    "HeavyHitter",
    "KVzap",
    "KVzip",
    "KeyDiff",
    "KeyNorm",
    "Observation",
    "QuerySample",
    "SnapKV",
    "StreamingLLM",
    "build_eviction",
    "method_class",
]


def method_class(name: str) -> type[Eviction]:
    """Return the class of an eviction method; the error about an unknown name lists the known ones."""
    if name not in METHODS:
        raise UserError(f"unknown eviction method {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def build_eviction(config: EvictionConfig) -> Eviction:
    """Return the method that a plan names, built once per config.

    Raises:
        UserError: the method is unknown, or the parameters are not the method's.
    """
    return _build_eviction(config, frozenset((name, type(value)) for name, value in config.params.items()))


@lru_cache(maxsize=256)
def _build_eviction(config: EvictionConfig, param_types: frozenset[tuple[str, type]]) -> Eviction:
    """Build a method; the types are a part of the cache's key, since parameters of 32 and 32.0 are equal."""
    method = method_class(config.method)
    try:
        params: dict[str, Any] = config.model_dump(include=set(SHARED_PARAMS)) | config.params
        eviction = method(**params)
    except TypeError as error:
        raise UserError(
            f"the plan's parameters {config.params} do not fit {config.method} ({error}); make a new plan"
        ) from None
    if eviction.config != config:
        raise UserError(f"the plan says {config}, but {config.method} is {eviction.config}; make a new plan")
    return eviction
