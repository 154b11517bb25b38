"""Time decode steps and prefills under several plans, next to transformers' own cache, in one process; plot both."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import DynamicCache, StaticCache

from baklava.cache.budgeted_cache import BudgetedCache
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
from baklava.runtime.batched_forward import decode_step
from baklava.runtime.context_reconstruction import REPEAT_OVERHEAD_TOKENS
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill

STATIC = "StaticCache, sdpa"
NO_CACHE = "no cache at all: the floor"
FULL_PLAN = "all entries, 16 bit"


@dataclass(frozen=True)
class DecodeRow:
    """Decode steps of the whole model with one kind of cache, at one context and batch size.

    Attributes:
        milliseconds: Median over rounds.
        spread: Interquartile range over the median.
        mean_milliseconds: Mean over rounds, which counts the few steps that evict.
        speedup: Median over rounds of the baseline's time over this one's.
        mean_speedup: The baseline's total time over this one's.
        over_floor: Median over rounds of this time over that of the model without a cache.
        allocated_over_reserved: Bytes allocated over bytes reserved.
        allocated_bytes: Bytes allocated.
    """

    context: int
    batch: int
    plan: str
    milliseconds: float
    spread: float
    mean_milliseconds: float
    speedup: float
    mean_speedup: float
    over_floor: float
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
        batches: Sequences of a step. As in the server, each of them has a cache of its own under a plan.
        share: Entries that the made plans keep.
        rounds: Steps of each contestant that count. With at least an eviction interval of them, the mean is fair.
        plans: Plans to time instead of the made ones, by the names that they get in the results.
    """
    rows: list[DecodeRow] = []
    with progress_bar(len(contexts) * len(batches), "decoding", "pair") as progress:
        for context in contexts:
            for batch in batches:
                steps = rounds + WARMUP_STEPS
                chosen = dict(plans or decode_plans(loaded, context, share))
                chosen[FULL_PLAN] = full_cache_plan(loaded.identity, loaded.geometry, context + steps, 16)
                rows += _benchmark_decode_pair(loaded, context, batch, chosen, rounds)
                progress.update(1)
    return {"benchmark": "decode", "machine": machine_info(), "rounds": rounds, "rows": [asdict(row) for row in rows]}


@torch.inference_mode()
def _benchmark_decode_pair(
    loaded: LoadedModel, context: int, batch: int, plans: Mapping[str, BudgetPlan], rounds: int
) -> list[DecodeRow]:
    stop = context + WARMUP_STEPS + rounds
    static = StaticCache(loaded.model.config, max_cache_len=stop)
    filled = {BASELINE: DynamicCache(config=loaded.model.config), STATIC: static}
    steps: dict[str, Callable[[], Any]] = {
        name: make_decode_step(loaded, fill_cache(loaded, cache, batch, context), batch)
        for name, cache in filled.items()
    }
    steps[NO_CACHE] = make_decode_step(loaded, None, batch)
    caches = {
        name: [fill_cache(loaded, BudgetedCache(plan, stop), 1, context) for _ in range(batch)]
        for name, plan in plans.items()
    }
    steps |= {name: partial(decode_step, loaded, own, [1] * batch) for name, own in caches.items()}
    timings = time_interleaved(steps, rounds, WARMUP_STEPS)
    for name, cache in filled.items():
        if int(cache.get_seq_length()) != stop:
            raise RuntimeError(f"{name} has seen {cache.get_seq_length()} tokens of {stop}")
    rows = []
    for name, timing in timings.items():
        own = caches.get(name, [])
        for cache in own:
            cache.check_integrity(stop)
        allocated, reserved = (sum(getattr(cache, field) for cache in own) for field in ("nbytes", "reserved_bytes"))
        rows.append(
            DecodeRow(
                context=context,
                batch=batch,
                plan=name,
                milliseconds=timing.median * 1e3,
                spread=timing.spread,
                mean_milliseconds=timing.mean * 1e3,
                speedup=timings[BASELINE].ratio_to(timing),
                mean_speedup=timings[BASELINE].total_ratio_to(timing),
                over_floor=timing.ratio_to(timings[NO_CACHE]),
                allocated_over_reserved=allocated / reserved if own else None,
                allocated_bytes=allocated if own else None,
            )
        )
    return rows


def decode_plans(loaded: LoadedModel, context: int, share: float) -> dict[str, BudgetPlan]:
    """Return plans by name: a share of the entries in 32 and 16 bits under several methods.

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
    """Return plans by name: a share of the entries in 16 bits under every method, and sinks + recent in chunks.

    Methods that predict scores need a profile, and cost what they cost without it.
    """
    tokens = (int(context * share),) * loaded.geometry.kv_heads
    evictions = {name: method() for name, method in METHODS.items() if not method().predicted_share}
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
        "mean_milliseconds": "mean ms",
        "speedup": "speedup",
        "mean_speedup": "of means",
        "over_floor": "x floor",
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
