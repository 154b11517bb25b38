"""Speed and peak memory of plans, next to transformers' own cache on the same machine."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

import torch
import transformers
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from baklava.allocation.plan_spec import ResolvedPlan
from baklava.cache import attention
from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.budgeted_layer import BudgetedLayer
from baklava.console import log, progress_bar
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel, load
from baklava.runtime.prefill import prefill


@dataclass(frozen=True)
class Timing:
    """Seconds that one run took in each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def mean(self) -> float:
        """Mean seconds, which count work that only few rounds do."""
        return statistics.mean(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median, a measure of the machine's noise; NaN for fewer than 3 rounds."""
        if len(self.seconds) < 3:
            return float("nan")
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median

    def ratio_to(self, other: "Timing") -> float:
        """Return the median over rounds of this run's time over the other's time in the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def total_ratio_to(self, other: "Timing") -> float:
        """Return this run's total time over the other's, which also counts work that only few rounds do."""
        return sum(self.seconds) / sum(other.seconds)


def time_interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int, warmup_rounds: int = 0) -> dict[str, Timing]:
    """Call every run once per round and rotate which one starts a round. Warm-up rounds are not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(warmup_rounds + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            runs[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warmup_rounds:
                seconds[name].append(time.perf_counter() - started)
    return {name: Timing(tuple(measured)) for name, measured in seconds.items()}


def machine_info() -> dict[str, Any]:
    """Return the hardware and library versions that measurements depend on."""
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


BASELINE = "DynamicCache, sdpa"

WARMUP_STEPS = 2
"""Decode steps that are run before any is timed."""


@contextmanager
def transformers_attention(loaded: LoadedModel) -> Iterator[None]:
    """Switch the model to transformers' own SDPA; it reads this setting at every forward."""
    loaded.model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        loaded.model.config._attn_implementation = attention.ATTN_IMPLEMENTATION


def random_prompt(loaded: LoadedModel, batch: int, tokens: int) -> Int[Tensor, "batch tokens"]:
    """Return prompts of random tokens, the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = loaded.model.config.vocab_size
    return torch.randint(5, vocab_size, (batch, tokens), generator=generator).to(loaded.device)


@torch.inference_mode()
def baseline_prefill(loaded: LoadedModel, ids: Int[Tensor, "batch tokens"]) -> None:
    """Prefill with transformers' own cache and attention."""
    with transformers_attention(loaded):
        loaded.model(ids, past_key_values=DynamicCache(config=loaded.model.config), logits_to_keep=1)


@torch.inference_mode()
def fill_cache(loaded: LoadedModel, cache: Any, batch: int, context: int) -> Any:
    """Fill a cache with random entries, as after a prompt of `context` tokens, and return it.

    The speed of a cache does not depend on the values in it, and this is faster than a prefill.
    """
    geometry, generator = loaded.geometry, torch.Generator(device=loaded.device).manual_seed(0)
    for index, window in enumerate(geometry.windows):
        if window == 0:
            continue
        kv_heads, head_dim = geometry.head_shape(index)
        shape = (batch, kv_heads, context, head_dim)
        entries = torch.randn(shape, generator=generator, device=loaded.device, dtype=loaded.model.dtype)
        scores = torch.rand(shape[:3], generator=generator, device=loaded.device)
        layer = cache.layers[index] if isinstance(cache, BudgetedCache) else None
        if isinstance(layer, BudgetedLayer):
            layer.predictor = None  # random scores have no order to change
            layer.load_prompt(entries, entries, scores)
        elif layer is not None:
            layer.update(entries, entries)
        else:
            cache.update(entries.clone(), entries.clone(), index)
    return cache


def make_decode_step(loaded: LoadedModel, cache: Any, batch: int) -> Callable[[], Any]:
    """Return a function that runs one decode step on a cache, or without one if `cache` is None.

    A budgeted cache is used with baklava's attention, anything else with transformers' own.
    """
    ids = torch.ones(batch, 1, dtype=torch.long, device=loaded.device)

    def step() -> Any:
        with nullcontext() if isinstance(cache, BudgetedCache) else transformers_attention(loaded):
            return loaded.model(ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)

    return step


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
    caches[BASELINE] = DynamicCache(config=loaded.model.config)
    steps = {name: make_decode_step(loaded, fill_cache(loaded, cache, 1, context), 1) for name, cache in caches.items()}
    return time_interleaved(steps, DECODE_STEPS, WARMUP_STEPS)


def _time_prefills(loaded: LoadedModel, plans: Mapping[str, ResolvedPlan], context: int) -> dict[str, Timing]:
    ids = random_prompt(loaded, 1, context)
    prefills: dict[str, Callable[[], Any]] = {BASELINE: lambda: baseline_prefill(loaded, ids)}
    for name, named in plans.items():
        prefills[name] = lambda plan=named.plan: prefill(loaded, plan, ids)  # type: ignore[misc]
    return time_interleaved(prefills, PREFILL_ROUNDS)


SAMPLING_INTERVAL_SECONDS = 0.003
WARMUP_TOKENS = 64


def measure_prefill_peak(loaded: LoadedModel, plan: BudgetPlan | None, context: int, batch: int = 1) -> int | None:
    """Return the bytes that one prefill of random tokens adds to the weights at its peak.

    Args:
        loaded: the model; the new process loads it once more, onto the same device.
        plan: the plan to prefill under; None stands for transformers' own cache.
        context: tokens of a prompt.
        batch: prompts in the prefill.

    Returns:
        None if the process failed, for example because this one fills the GPU.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        if plan is not None:
            plan.write(file)
        sizes = [str(context), str(batch), str(torch.get_num_threads())]
        arguments = [loaded.identity.id, loaded.dtype, str(loaded.device), str(file), *sizes]
        command = [sys.executable, "-m", "baklava.evaluation.speed", *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or [f"it ended with {ran.returncode}"])[-1]
        log(f"peak memory could not be measured ({reason})")
        return None
    return int(ran.stdout.strip().splitlines()[-1])


def prefill_peak_over_floor(loaded: LoadedModel, plan: BudgetPlan | None, context: int, batch: int = 1) -> float | None:
    """Return the peak of a prefill, weights included, over the least it can need.

    That floor is the weights, one layer's full keys and values, and the bytes of the plan, or for the baseline
    of its full cache.
    """
    peak = measure_prefill_peak(loaded, plan, context, batch)
    if peak is None:
        return None
    geometry = loaded.geometry
    weight_bytes = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    layer_bytes = 2 * batch * geometry.kv_heads * context * geometry.head_dim * loaded.model.dtype.itemsize
    cache_bytes = layer_bytes * geometry.layers if plan is None else batch * plan.bytes_per_sequence
    return (weight_bytes + peak) / (weight_bytes + layer_bytes + cache_bytes)


def _measure(model: str, dtype: str, device: str, plan_file: Path, context: int, batch: int, threads: int) -> int:
    loaded = load(model, dtype=dtype, device=device, threads=threads)
    ids = random_prompt(loaded, batch, context)
    baseline_prefill(loaded, ids[:, :WARMUP_TOKENS])  # loads the code and buffers that every prefill needs
    run: Callable[[], Any] = lambda: baseline_prefill(loaded, ids)  # noqa: E731
    if plan_file.exists():
        plan = BudgetPlan.read(plan_file)
        run = lambda: prefill(loaded, plan, ids)  # noqa: E731
    if loaded.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(loaded.device)
        before = torch.cuda.memory_allocated(loaded.device)
        run()
        return torch.cuda.max_memory_allocated(loaded.device) - before
    before = _anonymous_bytes()
    with _sampled_memory() as samples:
        run()
    return max(samples) - before


@contextmanager
def _sampled_memory() -> Iterator[list[int]]:
    """Sample this process's memory; the kernel's high-water mark would count weights that were paged in again."""
    samples, stop = [_anonymous_bytes()], Event()

    def sample() -> None:
        while not stop.wait(SAMPLING_INTERVAL_SECONDS):
            samples.append(_anonymous_bytes())

    sampler = Thread(target=sample)
    sampler.start()
    try:
        yield samples
    finally:
        stop.set()
        sampler.join()


def _anonymous_bytes() -> int:
    """Return the resident bytes of this process, without those of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    model, dtype, device, file, context, batch, threads = sys.argv[1:]
    print(_measure(model, dtype, device, Path(file), int(context), int(batch), int(threads)))
