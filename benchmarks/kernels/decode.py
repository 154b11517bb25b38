"""The plans that the benchmarks time, and caches that are full from the start."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import DynamicCache

from baklava.cache import attention
from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.budgeted_layer import RaggedLayer
from baklava.console import progress_bar
from baklava.errors import UserError
from baklava.eviction import METHODS, Eviction, HeavyHitter, Streaming
from baklava.plan.budget_plan import AllocationChoice, Bits, BudgetPlan, LayerBudget, Prefill, full_plan
from baklava.runtime.model_loader import LoadedModel
from benchmarks.timing import machine, take_turns
from benchmarks.transformers_baseline import PEER, as_peer

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


WARM_UP = 2


@dataclass(frozen=True)
class Row:
    """One contestant at one context and batch. Ratios are medians over rounds; above 1 is faster than the peer.

    `attention` is how many times as long one layer's attention takes as one fused SDPA over as many entries in the
    model's own dtype, evictions included; a whole step is one between two evictions. `resident` is measured over
    promised bytes.
    """

    context: int
    batch: int
    plan: str
    milliseconds: float
    spread: float
    speedup: float
    attention: float | None = None
    resident: float | None = None
    bytes: int | None = None


def decode(
    loaded: LoadedModel, contexts: Sequence[int], batches: Sequence[int], share: float, rounds: int
) -> dict[str, Any]:
    """Time every plan at every context and batch; the caches of one pair live at the same time."""
    rows: list[Row] = []
    with progress_bar(len(contexts) * len(batches), "decoding", "pair") as progress:
        for context in contexts:
            for batch in batches:
                rows += _pair(loaded, context, batch, share, rounds)
                progress.update(1)
    return {"benchmark": "decode", "machine": machine(), "rounds": rounds, "rows": [asdict(row) for row in rows]}


@torch.inference_mode()
def _pair(loaded: LoadedModel, context: int, batch: int, share: float, rounds: int) -> list[Row]:
    plans = decode_plans(loaded, context, share, steps=rounds + WARM_UP)
    caches = {name: filled(loaded, BudgetedCache(plan), batch, context) for name, plan in plans.items()}
    caches |= {PEER: filled(loaded, DynamicCache(), batch, context), FLOOR: None}
    timings = take_turns({name: stepper(loaded, cache, batch) for name, cache in caches.items()}, rounds, WARM_UP)
    plain = {name: timings[name] for name in (PEER, FLOOR)}
    rows = [
        Row(context, batch, name, timing.median * 1e3, timing.spread, timings[PEER].over(timing))
        for name, timing in plain.items()
    ]
    for name, plan in plans.items():
        timing, cache = timings[name], caches[name]
        cache.check_integrity()
        resident = cache.nbytes / (cache.promised_bytes * batch)
        speedup, alone = timings[PEER].over(timing), attention_alone(loaded, plan, batch, context)
        rows.append(
            Row(context, batch, name, timing.median * 1e3, timing.spread, speedup, alone, resident, cache.nbytes)
        )
    return rows


def stepper(loaded: LoadedModel, cache: Any, batch: int) -> Callable[[], Any]:
    """A decode step on this cache: baklava's own attention for a budgeted one, else the peer's."""
    ids = torch.ones(batch, 1, dtype=torch.long, device=loaded.device)

    def step() -> Any:
        with nullcontext() if isinstance(cache, BudgetedCache) else as_peer(loaded):
            return loaded.model(ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)

    return step


@torch.inference_mode()
def attention_alone(loaded: LoadedModel, plan: BudgetPlan, batch: int, context: int) -> float:
    """One layer's `update` and attention over one fused SDPA on as many entries in one dense tensor.

    Over as many tokens as lie between two evictions, so that one of them is among the rounds.
    """
    geometry, budget = loaded.geometry, plan.layers[0]
    assert budget is not None
    cache = BudgetedCache(plan)
    layer = filled(loaded, cache, batch, context).ragged()[0]
    kernel = attention.Kernel(geometry.head_dim**-0.5)
    like = {"device": loaded.device, "dtype": loaded.model.dtype}
    new = torch.randn(batch, geometry.kv_heads, 1, geometry.head_dim, **like)
    query = torch.randn(batch, geometry.query_heads, 1, geometry.head_dim, **like)
    mean = sum(budget.tokens) // geometry.kv_heads
    key, value = torch.randn(2, batch, geometry.kv_heads, min(mean, context), geometry.head_dim, **like)
    rows = query.view(batch, geometry.kv_heads, geometry.query_group, geometry.head_dim)
    contestants = {"ours": lambda: _attend(layer, query, new, kernel), "fused": lambda: sdpa(rows, key, value)}
    timings = take_turns(contestants, max(32, plan.eviction.interval), WARM_UP)
    return timings["ours"].over_in_all(timings["fused"])


def _attend(layer: RaggedLayer, query: Any, new: Any, kernel: attention.Kernel) -> None:
    key, value = layer.update(new, new)
    layer.attend(query, key, value, None, kernel)
