"""Prefill of the whole model: time per eviction method, and the peak of memory over its floor."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from baklava.console import log, progress_bar
from baklava.runtime.context_reconstruction import CHUNK as REPEATED
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill as enter
from benchmarks.kernels.decode import prefill_plans
from benchmarks.peak_memory import over_floor, plain
from benchmarks.timing import Timing, machine, take_turns
from benchmarks.transformers_baseline import PEER


@dataclass(frozen=True)
class Row:
    """One contestant at one context and batch.

    `over_peer` and `over_streaming` are medians over rounds of how many times as long it takes; `peak` is its highest
    memory over the floor: weights, one layer's dense keys and values, and the plan.
    """

    context: int
    batch: int
    plan: str
    seconds: float
    spread: float
    over_peer: float
    over_streaming: float
    peak: float | None = None


def prefill(
    loaded: LoadedModel, contexts: Sequence[int], batches: Sequence[int], share: float, rounds: int, memory: bool
) -> dict[str, Any]:
    """Time every eviction method at every context and batch; peaks are taken in processes of their own."""
    rows: list[Row] = []
    with progress_bar(len(contexts) * len(batches), "prefilling", "pair") as progress:
        for context in contexts:
            for batch in batches:
                rows += _pair(loaded, context, batch, share, rounds, memory)
                progress.update(1)
    return {"benchmark": "prefill", "machine": machine(), "rounds": rounds, "rows": [asdict(row) for row in rows]}


def _pair(loaded: LoadedModel, context: int, batch: int, share: float, rounds: int, memory: bool) -> list[Row]:
    draw = torch.Generator().manual_seed(0)
    vocabulary = loaded.model.config.vocab_size
    ids = torch.randint(5, vocabulary, (batch, context), generator=draw).to(loaded.device)
    plans = prefill_plans(loaded, context, share)
    if context + REPEATED + 64 > loaded.max_length:
        plans.pop("reconstruction")
        log(f"{context} tokens leave no room to repeat a chunk: reconstruction is left out")
    contestants: dict[str, Callable[[], Any]] = {PEER: lambda: plain(loaded, ids)}
    contestants |= {name: lambda plan=plan: enter(loaded, plan, ids) for name, plan in plans.items()}  # type: ignore[misc]
    for run in (lambda: plain(loaded, ids[:, :64]), lambda: enter(loaded, plans["streaming"], ids[:, :64])):
        run()
    timings = take_turns(contestants, rounds)
    of = {PEER: None, **plans}
    peaks = {name: over_floor(loaded, plan, context, batch) if memory else None for name, plan in of.items()}
    return [_row(name, context, batch, timings, peaks[name]) for name in timings]


def _row(name: str, context: int, batch: int, timings: dict[str, Timing], peak: float | None) -> Row:
    mine = timings[name]
    over_peer, over_streaming = mine.over(timings[PEER]), mine.over(timings["streaming"])
    return Row(context, batch, name, mine.median, mine.spread, over_peer, over_streaming, peak)
