"""Decode steps of the whole model, and attention alone, against transformers' DynamicCache with sdpa."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import DynamicCache

from baklava import attention
from baklava.cache import BudgetedCache
from baklava.model import LoadedModel
from baklava.plan import BudgetPlan
from baklava.progress import bar
from baklava.ragged import RaggedLayer
from benchmarks.peer import PEER, as_peer
from benchmarks.plans import FLOOR, decode_plans, filled
from benchmarks.rounds import machine, take_turns

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
    with bar(len(contexts) * len(batches), "decoding", "pair") as progress:
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
