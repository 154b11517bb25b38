"""The speed of plans and the peak memory of their prefill, compared with transformers' own cache."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from baklava.allocation.plan_spec import ResolvedPlan
from baklava.cache.budgeted_cache import BudgetedCache
from baklava.console import progress_bar
from baklava.evaluation.speed.peak_memory import measure_prefill_peak
from baklava.evaluation.speed.timing import Timing, time_interleaved
from baklava.evaluation.speed.workloads import (
    BASELINE,
    WARMUP_STEPS,
    baseline_prefill,
    fill_cache,
    make_decode_step,
    random_prompt,
)
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill

DECODE_STEPS = 12
PREFILL_ROUNDS = 2


@dataclass(frozen=True)
class Speed:
    """The speed of a plan at `context` tokens and batch size 1, next to transformers' own cache on the same machine.

    `decode_ratio` is the baseline's time per decode step over the plan's, so above 1 the plan is faster.
    `prefill_ratio` is the plan's prefill time over the baseline's, so above 1 the plan is slower.
    `peak_bytes` is the peak memory of one prefill on top of the weights; None if it was not measured.
    """

    context: int
    decode_milliseconds: float
    decode_ratio: float
    prefill_seconds: float
    prefill_ratio: float
    peak_bytes: int | None


def measure_speeds(loaded: LoadedModel, plans: Sequence[ResolvedPlan]) -> dict[str, Speed]:
    """Time decode steps and a prefill of every plan and of the baseline, interleaved, and measure the plans' peaks.

    The prompt is as long as the shortest context of the plans, minus the tokens that are then decoded.

    Returns:
        The speed of each plan by its name.
    """
    context = min(named.plan.context_length for named in plans) - DECODE_STEPS - WARMUP_STEPS
    by_name = {named.name: named for named in plans}
    with progress_bar(2 + len(plans), "timing", "measurements") as progress:
        decoding = _time_decoding(loaded, by_name, context)
        progress.update(1)
        prefilling = _time_prefills(loaded, by_name, context)
        progress.update(1)
        peaks = {}
        for name, named in by_name.items():
            peaks[name] = measure_prefill_peak(loaded, named.plan, context)
            progress.update(1)
    return {
        name: Speed(
            context=context,
            decode_milliseconds=1e3 * decoding[name].median,
            decode_ratio=decoding[BASELINE].ratio_to(decoding[name]),
            prefill_seconds=prefilling[name].median,
            prefill_ratio=prefilling[name].ratio_to(prefilling[BASELINE]),
            peak_bytes=peaks[name],
        )
        for name in by_name
    }


@torch.inference_mode()
def _time_decoding(loaded: LoadedModel, plans: Mapping[str, ResolvedPlan], context: int) -> dict[str, Timing]:
    caches: dict[str, Any] = {name: BudgetedCache(named.plan) for name, named in plans.items()}
    caches[BASELINE] = DynamicCache()
    steps = {name: make_decode_step(loaded, fill_cache(loaded, cache, 1, context), 1) for name, cache in caches.items()}
    return time_interleaved(steps, DECODE_STEPS, WARMUP_STEPS)


def _time_prefills(loaded: LoadedModel, plans: Mapping[str, ResolvedPlan], context: int) -> dict[str, Timing]:
    ids = random_prompt(loaded, 1, context)
    prefills: dict[str, Callable[[], Any]] = {BASELINE: lambda: baseline_prefill(loaded, ids)}
    for name, named in plans.items():
        prefills[name] = lambda plan=named.plan: prefill(loaded, plan, ids)  # type: ignore[misc]
    return time_interleaved(prefills, PREFILL_ROUNDS)
