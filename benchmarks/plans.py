"""The plans that the benchmarks time, and caches that are full from the start."""

from typing import Any

import torch
from transformers import DynamicCache

from baklava.cache import BudgetedCache
from baklava.errors import UserError
from baklava.eviction import METHODS, Eviction, HeavyHitter, Streaming
from baklava.model import LoadedModel
from baklava.plan import AllocationChoice, Bits, BudgetPlan, LayerBudget, Prefill, full_plan

FLOOR = "no cache at all: the floor"
CHUNK = 512


def plan_of(loaded: LoadedModel, tokens: tuple[int, ...], eviction: Eviction, bits: Bits, context: int) -> BudgetPlan:
    """The same capacities per KV head in every layer.

    Raises:
        UserError: the heads cannot live with so few entries.
    """
    if min(tokens) < eviction.choice.minimum_tokens:
        raise UserError(
            f"{min(tokens)} of {context} tokens, but {eviction.name} needs {eviction.choice.minimum_tokens} per head; "
            "raise --contexts or --share"
        )
    same = (bits,) * loaded.geometry.kv_heads
    layer = LayerBudget(tokens=tokens, key_bits=same, value_bits=same)
    return BudgetPlan(
        model=loaded.identity,
        geometry=loaded.geometry,
        context_length=context,
        eviction=eviction.choice,
        allocation=AllocationChoice(method="benchmark", budget=1.0),
        layers=(layer,) * loaded.geometry.layers,
    )


def decode_plans(loaded: LoadedModel, context: int, share: float, steps: int) -> dict[str, BudgetPlan]:
    """Plans by name: a share of the entries in 32 and 16 bits, kept in several ways, and all entries.

    "ragged" gives the heads of a layer half, once and one and a half times the share, so that none can be grouped.
    """
    heads = loaded.geometry.kv_heads
    kept = int(context * share)
    even = (kept,) * heads
    uneven = tuple(round(kept * (0.5 + head / max(1, heads - 1))) for head in range(heads))
    percent = f"{share:.0%}"
    return {
        f"{percent}, sinks + recent": plan_of(loaded, even, Streaming(), 32, context),
        f"{percent}, sinks + recent, ragged": plan_of(loaded, uneven, Streaming(), 32, context),
        f"{percent}, heavy hitter": plan_of(loaded, even, HeavyHitter(), 32, context),
        f"{percent}, sinks + recent, 16 bit": plan_of(loaded, even, Streaming(), 16, context),
        f"{percent}, heavy hitter, 16 bit": plan_of(loaded, even, HeavyHitter(), 16, context),
        "all entries": full_plan(loaded.identity, loaded.geometry, context + steps, 32),
        "all entries, 16 bit": full_plan(loaded.identity, loaded.geometry, context + steps, 16),
    }


def evictions() -> dict[str, Eviction]:
    """Every method with its default knobs, and heavy hitters that look at every fourth query."""
    own = {name: method() for name, method in METHODS.items()}
    return own | {"heavy_hitter, stride 4": HeavyHitter(stride=4)}


def prefill_plans(loaded: LoadedModel, context: int, share: float) -> dict[str, BudgetPlan]:
    """The share of the entries in 16 bits under each method, and sinks + recent in chunks."""
    tokens = (int(context * share),) * loaded.geometry.kv_heads
    plans = {name: plan_of(loaded, tokens, eviction, 16, context) for name, eviction in evictions().items()}
    chunked = plans["streaming"].model_copy(update={"prefill": Prefill(mode="chunked", chunk=CHUNK)})
    return plans | {"streaming, chunked": chunked}


@torch.inference_mode()
def filled(loaded: LoadedModel, cache: Any, batch: int, context: int) -> Any:
    """The cache behind a prompt of random entries: how fast it is does not depend on what they are."""
    geometry, draw = loaded.geometry, torch.Generator(device=loaded.device).manual_seed(0)
    shape = (batch, geometry.kv_heads, context, geometry.head_dim)
    entries = torch.randn(shape, generator=draw, device=loaded.device, dtype=loaded.model.dtype)
    score = torch.rand(shape[:3], generator=draw, device=loaded.device)
    for index in range(geometry.layers):
        if isinstance(cache, DynamicCache):
            cache.update(entries.clone(), entries.clone(), index)
        elif isinstance(cache, BudgetedCache):
            cache.ragged()[index].fill(entries, entries, score)
    return cache
