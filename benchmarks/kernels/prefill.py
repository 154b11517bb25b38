"""Time the prefill of the whole model under every eviction method, and measure its peak memory over the floor."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from baklava.console import log, progress_bar
from baklava.evaluation.speed import (
    BASELINE,
    WARMUP_TOKENS,
    baseline_prefill,
    machine_info,
    prefill_peak_over_floor,
    random_prompt,
    time_interleaved,
)
from baklava.eviction import METHODS, HeavyHitter, KVzip, StreamingLLM
from baklava.plan.budget_plan import BudgetPlan, PrefillConfig
from baklava.runtime.context_reconstruction import REPEAT_OVERHEAD_TOKENS
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill
from benchmarks.kernels.decode import same_plan_in_all_layers

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
                rows += _benchmark_pair(loaded, context, batch, share, rounds, memory)
                progress.update(1)
    return {"benchmark": "prefill", "machine": machine_info(), "rounds": rounds, "rows": [asdict(row) for row in rows]}


def _benchmark_pair(
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
