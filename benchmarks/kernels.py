"""Time decode steps and prefills under several plans, next to transformers' own cache, in one process; plot both."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import DynamicCache

from baklava.cache import attention
from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.budgeted_layer import BudgetedLayer
from baklava.console import log, progress_bar
from baklava.errors import UserError
from baklava.evaluation.speed import (
    BASELINE,
    WARMUP_STEPS,
    WARMUP_TOKENS,
    baseline_prefill,
    fill_cache,
    machine_info,
    make_decode_step,
    prefill_peak_over_floor,
    random_prompt,
    time_interleaved,
)
from baklava.eviction import METHODS, Eviction, HeavyHitter, KVzip, StreamingLLM
from baklava.plan.budget_plan import AllocationConfig, Bits, BudgetPlan, LayerBudget, PrefillConfig, full_cache_plan
from baklava.runtime.context_reconstruction import REPEAT_OVERHEAD_TOKENS
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill

NO_CACHE = "no cache at all: the floor"

MIN_ATTENTION_ROUNDS = 32


@dataclass(frozen=True)
class DecodeRow:
    """Decode steps with one cache at one context and batch size.

    Attributes:
        milliseconds: median over rounds of a step of the whole model, none of which evicts.
        spread: interquartile range over the median.
        speedup: median over rounds of the baseline's time over this one's.
        attention_over_sdpa: time of one layer's attention, evictions included, over that of one fused SDPA over as
            many entries in the model's own dtype.
        allocated_over_reserved: bytes allocated over bytes reserved.
        allocated_bytes: bytes allocated.
    """

    context: int
    batch: int
    plan: str
    milliseconds: float
    spread: float
    speedup: float
    attention_over_sdpa: float | None = None
    allocated_over_reserved: float | None = None
    allocated_bytes: int | None = None


def benchmark_decode(
    loaded: LoadedModel,
    contexts: Sequence[int],
    batches: Sequence[int],
    share: float,
    rounds: int,
    plans: Mapping[str, BudgetPlan] | None = None,
) -> dict[str, Any]:
    """Time every plan at every context and batch size; all caches of one such pair are in memory together.

    Args:
        loaded: The model.
        contexts: Tokens before the steps.
        batches: Rows of a cache.
        share: Entries that the made plans keep.
        rounds: Steps of each contestant that count.
        plans: Further plans, by the names that they get in the results.
    """
    rows: list[DecodeRow] = []
    with progress_bar(len(contexts) * len(batches), "decoding", "pair") as progress:
        for context in contexts:
            for batch in batches:
                made = decode_plans(loaded, context, share, steps=rounds + WARMUP_STEPS)
                rows += _benchmark_decode_pair(loaded, context, batch, made | dict(plans or {}), rounds)
                progress.update(1)
    return {"benchmark": "decode", "machine": machine_info(), "rounds": rounds, "rows": [asdict(row) for row in rows]}


@torch.inference_mode()
def _benchmark_decode_pair(
    loaded: LoadedModel, context: int, batch: int, plans: Mapping[str, BudgetPlan], rounds: int
) -> list[DecodeRow]:
    caches = {name: fill_cache(loaded, BudgetedCache(plan), batch, context) for name, plan in plans.items()}
    caches |= {BASELINE: fill_cache(loaded, DynamicCache(), batch, context), NO_CACHE: None}
    steps = {name: make_decode_step(loaded, cache, batch) for name, cache in caches.items()}
    timings = time_interleaved(steps, rounds, WARMUP_STEPS)
    rows = []
    for name in (BASELINE, NO_CACHE, *plans):
        timing, cache, plan = timings[name], caches[name], plans.get(name)
        if plan is not None:
            cache.check_integrity(context + WARMUP_STEPS + rounds)
        rows.append(
            DecodeRow(
                context=context,
                batch=batch,
                plan=name,
                milliseconds=timing.median * 1e3,
                spread=timing.spread,
                speedup=timings[BASELINE].ratio_to(timing),
                attention_over_sdpa=attention_over_sdpa(loaded, plan, batch, context) if plan else None,
                allocated_over_reserved=cache.nbytes / (cache.reserved_bytes * batch) if plan else None,
                allocated_bytes=cache.nbytes if plan else None,
            )
        )
    return rows


@torch.inference_mode()
def attention_over_sdpa(loaded: LoadedModel, plan: BudgetPlan, batch: int, context: int) -> float:
    """Return the time of one layer's `update` and attention over that of a fused SDPA on one dense tensor.

    The tensor has as many entries as the plan's heads on average. The rounds span at least one eviction interval,
    so that the time includes evictions.
    """
    geometry, budget = loaded.geometry, plan.layers[0]
    assert budget is not None
    layer = fill_cache(loaded, BudgetedCache(plan), batch, context).budgeted_layers[0]
    kernel = attention.AttentionParams(geometry.head_dim**-0.5)
    options = {"device": loaded.device, "dtype": loaded.model.dtype}
    new = torch.randn(batch, geometry.kv_heads, 1, geometry.head_dim, **options)
    query = torch.randn(batch, geometry.query_heads, 1, geometry.head_dim, **options)
    entries = min(sum(budget.tokens) // geometry.kv_heads, context)
    key, value = torch.randn(2, batch, geometry.kv_heads, entries, geometry.head_dim, **options)
    grouped_query = query.view(batch, geometry.kv_heads, geometry.query_group, geometry.head_dim)
    runs = {"plan": lambda: _attend(layer, query, new, kernel), "sdpa": lambda: sdpa(grouped_query, key, value)}
    timings = time_interleaved(runs, max(MIN_ATTENTION_ROUNDS, plan.eviction.eviction_interval), WARMUP_STEPS)
    return timings["plan"].total_ratio_to(timings["sdpa"])


def _attend(layer: BudgetedLayer, query: Any, new: Any, kernel: attention.AttentionParams) -> None:
    key, value = layer.update(new, new)
    layer.attend(query, key, value, None, kernel)


def decode_plans(loaded: LoadedModel, context: int, share: float, steps: int) -> dict[str, BudgetPlan]:
    """Return plans by name: a share of the entries in 32 and 16 bits under several methods, and all entries.

    "ragged" gives the heads of a layer from 0.5 to 1.5 times the share, so that none of them can be grouped.
    """
    heads = loaded.geometry.kv_heads
    tokens = int(context * share)
    even = (tokens,) * heads
    uneven = tuple(round(tokens * (0.5 + head / max(1, heads - 1))) for head in range(heads))
    percent = f"{share:.0%}"
    return {
        f"{percent}, sinks + recent": same_plan_in_all_layers(loaded, even, StreamingLLM(), 32, context),
        f"{percent}, sinks + recent, ragged": same_plan_in_all_layers(loaded, uneven, StreamingLLM(), 32, context),
        f"{percent}, heavy hitter": same_plan_in_all_layers(loaded, even, HeavyHitter(), 32, context),
        f"{percent}, sinks + recent, 16 bit": same_plan_in_all_layers(loaded, even, StreamingLLM(), 16, context),
        f"{percent}, heavy hitter, 16 bit": same_plan_in_all_layers(loaded, even, HeavyHitter(), 16, context),
        "all entries": full_cache_plan(loaded.identity, loaded.geometry, context + steps, 32),
        "all entries, 16 bit": full_cache_plan(loaded.identity, loaded.geometry, context + steps, 16),
    }


def same_plan_in_all_layers(
    loaded: LoadedModel, tokens: tuple[int, ...], eviction: Eviction, bits: Bits, context: int
) -> BudgetPlan:
    """Return a plan whose layers all have these `tokens` per KV head.

    Raises:
        UserError: a head has fewer tokens than the eviction method needs.
    """
    if min(tokens) < eviction.config.min_tokens:
        raise UserError(
            f"{min(tokens)} of {context} tokens are fewer than the {eviction.config.min_tokens} per head that "
            f"{eviction.name} needs; raise --contexts or --share"
        )
    bits_per_head = (bits,) * loaded.geometry.kv_heads
    layer = LayerBudget(tokens=tokens, key_bits=bits_per_head, value_bits=bits_per_head)
    return BudgetPlan(
        model=loaded.identity,
        geometry=loaded.geometry,
        context_length=context,
        eviction=eviction.config,
        allocation=AllocationConfig(method="benchmark", budget=1.0),
        layers=(layer,) * loaded.geometry.layers,
    )


PREFILL_CHUNK_TOKENS = 512


@dataclass(frozen=True)
class PrefillRow:
    """Prefills under one plan at one context and batch size.

    Attributes:
        seconds: median over rounds.
        spread: interquartile range over the median.
        over_baseline: median over rounds of this plan's time over the baseline's.
        over_streaming: the same over the plan with sinks and recent tokens.
        peak_over_floor: peak memory over the floor: weights, one layer's full keys and values, and the plan.
    """

    context: int
    batch: int
    plan: str
    seconds: float
    spread: float
    over_baseline: float
    over_streaming: float
    peak_over_floor: float | None = None


def benchmark_prefill(
    loaded: LoadedModel, contexts: Sequence[int], batches: Sequence[int], share: float, rounds: int, memory: bool
) -> dict[str, Any]:
    """Time every eviction method at every context and batch size; each peak is measured in its own process."""
    rows: list[PrefillRow] = []
    with progress_bar(len(contexts) * len(batches), "prefilling", "pair") as progress:
        for context in contexts:
            for batch in batches:
                rows += _benchmark_prefill_pair(loaded, context, batch, share, rounds, memory)
                progress.update(1)
    return {"benchmark": "prefill", "machine": machine_info(), "rounds": rounds, "rows": [asdict(row) for row in rows]}


def _benchmark_prefill_pair(
    loaded: LoadedModel, context: int, batch: int, share: float, rounds: int, memory: bool
) -> list[PrefillRow]:
    ids = random_prompt(loaded, batch, context)
    plans = prefill_plans(loaded, context, share)
    if context + REPEAT_OVERHEAD_TOKENS > loaded.max_length:
        plans.pop(KVzip.name)
        log(f"{KVzip.name} is left out: repeating {context} tokens exceeds the model's {loaded.max_length}")
    runs: dict[str, Callable[[], Any]] = {BASELINE: lambda: baseline_prefill(loaded, ids)}
    runs |= {name: lambda plan=plan: prefill(loaded, plan, ids) for name, plan in plans.items()}  # type: ignore[misc]
    baseline_prefill(loaded, ids[:, :WARMUP_TOKENS])
    prefill(loaded, plans[StreamingLLM.name], ids[:, :WARMUP_TOKENS])
    timings = time_interleaved(runs, rounds)
    return [
        PrefillRow(
            context=context,
            batch=batch,
            plan=name,
            seconds=timing.median,
            spread=timing.spread,
            over_baseline=timing.ratio_to(timings[BASELINE]),
            over_streaming=timing.ratio_to(timings[StreamingLLM.name]),
            peak_over_floor=prefill_peak_over_floor(loaded, plans.get(name), context, batch) if memory else None,
        )
        for name, timing in timings.items()
    ]


def prefill_plans(loaded: LoadedModel, context: int, share: float) -> dict[str, BudgetPlan]:
    """Return plans by name: a share of the entries in 16 bits under every method, and sinks + recent in chunks."""
    tokens = (int(context * share),) * loaded.geometry.kv_heads
    evictions = {name: method() for name, method in METHODS.items()}
    evictions["heavy_hitter, stride 4"] = HeavyHitter(stride=4)
    plans = {name: same_plan_in_all_layers(loaded, tokens, method, 16, context) for name, method in evictions.items()}
    chunked = PrefillConfig(mode="chunked", chunk_size=PREFILL_CHUNK_TOKENS)
    return plans | {f"{StreamingLLM.name}, chunked": plans[StreamingLLM.name].model_copy(update={"prefill": chunked})}


PLOTTED_COLUMNS = {
    "decode": ("speedup", "speedup over the baseline's step"),
    "prefill": ("over_baseline", "prefill time over the baseline's"),
}
TABLE_COLUMNS = {
    "decode": {
        "milliseconds": "ms",
        "spread": "spread",
        "speedup": "speedup",
        "attention_over_sdpa": "x SDPA",
        "allocated_over_reserved": "allocated",
    },
    "prefill": {
        "seconds": "s",
        "spread": "spread",
        "over_baseline": "x baseline",
        "over_streaming": "x streaming",
        "peak_over_floor": "x floor",
    },
}

LINE_STYLES: Mapping[str, Mapping[str, Any]] = {
    BASELINE: {"color": "black"},
    NO_CACHE: {"color": "black", "linestyle": "--", "linewidth": 1},
}


def table(results: Mapping[str, Any]) -> str:
    """Return an aligned text table with one line per row of the results."""
    columns = TABLE_COLUMNS[results["benchmark"]]
    rows = results["rows"]
    name_width = max(len(row["plan"]) for row in rows)
    header = f"{'tokens':>6} {'batch':>5}  {'plan':<{name_width}}"
    lines = [header + "".join(f"{title:>13}" for title in columns.values())]
    for row in rows:
        cells = "".join(f"{_cell(row[column]):>13}" for column in columns)
        lines.append(f"{row['context']:>6} {row['batch']:>5}  {row['plan']:<{name_width}}{cells}")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Plot one panel per batch size, with one line per plan over the context."""
    rows: Sequence[Mapping[str, Any]] = results["rows"]
    column, label = PLOTTED_COLUMNS[results["benchmark"]]
    batches = sorted({row["batch"] for row in rows})
    figure = Figure(figsize=(4.2 * len(batches) + 2.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
    for axes, batch in zip(panels, batches, strict=True):
        for name in dict.fromkeys(row["plan"] for row in rows):
            points = [(row["context"], row[column]) for row in rows if (row["plan"], row["batch"]) == (name, batch)]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **LINE_STYLES.get(name, {}))
        contexts = sorted({row["context"] for row in rows})
        axes.set(title=f"batch {batch}", xlabel="tokens of context", xscale="log")
        axes.set_xticks(contexts, [str(context) for context in contexts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(label)
    panels[0].set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
