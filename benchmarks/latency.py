"""The speed of plans as they are, and the memory of their prefill, next to transformers' own cache."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from baklava.allocation.plan_spec import NamedPlan
from baklava.cache.budgeted_cache import BudgetedCache
from baklava.console import progress_bar
from baklava.evaluation.results import Speed
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill
from benchmarks.kernels.decode import WARM_UP, filled, stepper
from benchmarks.peak_memory import peak, plain
from benchmarks.timing import Timing, take_turns
from benchmarks.transformers_baseline import PEER

STEPS = 12
PREFILLS = 2


def speeds(loaded: LoadedModel, plans: Sequence[NamedPlan]) -> dict[str, Speed]:
    """Decode steps and one prompt for every plan and the peer, in turns in one process, and the plans' peaks.

    The prompt is as long as the shortest of the plans' contexts, less the tokens that are then decoded.
    """
    context = min(named.plan.context_length for named in plans) - STEPS - WARM_UP
    by_name = {named.name: named for named in plans}
    with progress_bar(2 + len(plans), "timing", "measurements") as progress:
        decoding = _decoding(loaded, by_name, context)
        progress.update(1)
        prefilling = _prefilling(loaded, by_name, context)
        progress.update(1)
        peaks = {}
        for name, named in by_name.items():
            peaks[name] = peak(loaded, named.plan, context)
            progress.update(1)
    return {name: _speed(name, context, decoding, prefilling, peaks[name]) for name in by_name}


@torch.inference_mode()
def _decoding(loaded: LoadedModel, plans: Mapping[str, NamedPlan], context: int) -> dict[str, Timing]:
    caches: dict[str, Any] = {name: BudgetedCache(named.plan) for name, named in plans.items()}
    caches[PEER] = DynamicCache()
    contestants = {name: stepper(loaded, filled(loaded, cache, 1, context), 1) for name, cache in caches.items()}
    return take_turns(contestants, STEPS, WARM_UP)


def _prefilling(loaded: LoadedModel, plans: Mapping[str, NamedPlan], context: int) -> dict[str, Timing]:
    ids = torch.randint(5, loaded.model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    ids = ids.to(loaded.device)
    contestants: dict[str, Callable[[], Any]] = {PEER: lambda: plain(loaded, ids)}
    for name, named in plans.items():
        contestants[name] = lambda plan=named.plan: prefill(loaded, plan, ids)  # type: ignore[misc]
    return take_turns(contestants, PREFILLS)


def _speed(
    name: str, context: int, decoding: Mapping[str, Timing], prefilling: Mapping[str, Timing], peak_bytes: int | None
) -> Speed:
    return Speed(
        context=context,
        decode_milliseconds=1e3 * decoding[name].median,
        decode_ratio=decoding[PEER].over(decoding[name]),
        prefill_seconds=prefilling[name].median,
        prefill_ratio=prefilling[name].over(prefilling[PEER]),
        peak_bytes=peak_bytes,
    )
