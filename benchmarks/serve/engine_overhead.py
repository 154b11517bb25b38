"""The engine without HTTP: the overhead of a step, decoding alongside a prefill, and sequences that fit the pool."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import mean
from typing import Any
from unittest.mock import patch

from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.batched_forward import batched_forward
from baklava.runtime.model_loader import LoadedModel
from benchmarks.serve.load_generator import percentiles
from benchmarks.serve.servers import ServeBenchmarkConfig
from serve_app.engine import model_runner
from serve_app.engine.engine import Engine, EngineConfig
from serve_app.engine.memory import max_sequences, prefill_workspace
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.types import EngineOutput, EngineRequest, TokenOutput

OUTPUTS_WHILE_OTHERS_ENTER = 4
"""Sequences that are counted together are this many times as long as others, so that none ends before all are in."""


class RequestObserver:
    """The outcome of one request, and the times of its tokens."""

    def __init__(self) -> None:
        self.token_times: list[float] = []
        self.error: Exception | None = None
        self.started, self.finished = threading.Event(), threading.Event()

    def receive(self, output: EngineOutput) -> None:
        """Record an output of the engine."""
        if isinstance(output, TokenOutput):
            self.token_times.append(time.perf_counter())
            self.started.set()
        if isinstance(output, Exception):
            self.error = output
        if isinstance(output, Exception) or (isinstance(output, TokenOutput) and output.finish_reason):
            self.started.set()
            self.finished.set()


@contextmanager
def running_engine(loaded: LoadedModel, plan: BudgetPlan, pool_bytes: int) -> Iterator[Engine]:
    """Run an engine until the block ends."""
    engine = Engine(loaded, plan, EngineConfig(pool_bytes, max_waiting=1 << 16))
    try:
        yield engine
    finally:
        engine.close()


def submit(engine: Engine, prompt: Sequence[int], num_tokens: int) -> RequestObserver:
    """Submit a request that generates exactly `num_tokens`."""
    observer = RequestObserver()
    params = SamplingParams(num_tokens, temperature=0, ignore_eos=True)
    engine.submit((EngineRequest(tuple(prompt), params), observer.receive))
    return observer


def engine_overhead(
    loaded: LoadedModel, plan: BudgetPlan, config: ServeBenchmarkConfig, prompt: Sequence[int]
) -> dict[str, float]:
    """Return the seconds of an engine's decode step and of its forward, which includes the caches."""
    workspace = prefill_workspace(loaded, plan, len(prompt) + 1)
    pool_bytes = 2 * (config.batch_size + 1) * plan.bytes_per_sequence + workspace
    forward_times: list[float] = []

    def timed_forward(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = batched_forward(*arguments)
        forward_times.append(time.perf_counter() - started)
        return result

    with (
        running_engine(loaded, plan, pool_bytes) as engine,
        patch.object(model_runner, "batched_forward", timed_forward),
    ):
        engine.pin_prefix(prompt)  # so that all sequences decode together from their first token on
        observers = [
            submit(engine, (*prompt, 1 + index), config.decode_steps + index) for index in range(config.batch_size)
        ]
        for observer in observers:
            observer.finished.wait()
    # All sequences run together from the last one's first token to the first one's last token.
    token_times = [moment for moment in observers[-1].token_times if moment <= observers[0].token_times[-1]]
    step_seconds = mean(
        after - before for before, after in pairwise(token_times)
    )  # a mean, since only some steps evict
    forward_seconds = mean(forward_times[-config.decode_steps : -config.batch_size])
    return {
        "batch_size": config.batch_size,
        "step_seconds": step_seconds,
        "forward_seconds": forward_seconds,
        "overhead": step_seconds / forward_seconds - 1,
    }


def decode_alongside_prefill(
    loaded: LoadedModel,
    plan: BudgetPlan,
    config: ServeBenchmarkConfig,
    prompt: Sequence[int],
    long_prompt: Sequence[int],
) -> dict[str, Any]:
    """Return the seconds between a sequence's tokens, alone and while a long prompt is prefilled."""
    pool_bytes = plan.bytes_per_sequence * 4 + prefill_workspace(loaded, plan, len(long_prompt) + 1)
    with running_engine(loaded, plan, pool_bytes) as engine:
        decoding = submit(engine, prompt, 4 * config.decode_steps + len(long_prompt) // 8)
        decoding.started.wait()
        while len(decoding.token_times) < 2 * config.decode_steps:
            time.sleep(0.01)
        prefilling = submit(engine, long_prompt, 1)
        started = time.perf_counter()
        prefilling.finished.wait()
        ended = time.perf_counter()
        decoding.finished.wait()
    gaps = [(after, after - before) for before, after in pairwise(decoding.token_times)]
    return {
        "prompt_tokens": len(long_prompt),
        "idle": percentiles([gap for moment, gap in gaps if moment < started or moment > ended + 1]),
        "alongside_prefill": percentiles([gap for moment, gap in gaps if started < moment <= ended]),
        "prefill_seconds": ended - started,
    }


def pool_capacity(
    loaded: LoadedModel, plan: BudgetPlan, full: BudgetPlan, config: ServeBenchmarkConfig
) -> list[dict[str, int]]:
    """Compute how many sequences of each length the engine admits into the pool."""
    itemsize = loaded.model.dtype.itemsize
    return [
        {
            "tokens": tokens,
            "full": max_sequences(full, config.pool_bytes, tokens, itemsize),
            "plan": max_sequences(plan, config.pool_bytes, tokens, itemsize),
        }
        for tokens in config.contexts
    ]


def concurrent_sequences(
    loaded: LoadedModel, plan: BudgetPlan, config: ServeBenchmarkConfig, prompt: Sequence[int]
) -> dict[str, int]:
    """Fill the pool with sequences, and count those that ran together, those that failed, and the bytes allocated.

    All of them share one pinned prefix: to prefill each prompt would take hours, and allocate the same bytes.
    """
    max_running = peak_bytes = 0
    with running_engine(loaded, plan, config.pool_bytes) as engine:
        engine.pin_prefix(prompt)
        output_tokens = OUTPUTS_WHILE_OTHERS_ENTER * config.output_tokens
        sequence_bytes = plan.bytes_for(len(prompt) + 1 + output_tokens)
        observers = [
            submit(engine, (*prompt, 1 + index), output_tokens)
            for index in range(config.pool_bytes // sequence_bytes + 2)
        ]
        while not all(observer.finished.wait(0.05) for observer in observers):
            state = engine.state()
            max_running = max(max_running, state.running)
            peak_bytes = max(peak_bytes, state.allocated_bytes)
        peak_bytes = max(peak_bytes, engine.state().peak_bytes)
    return {
        "submitted": len(observers),
        "running": max_running,
        "peak_bytes": peak_bytes,
        "pool_bytes": config.pool_bytes,
        "failed": sum(observer.error is not None for observer in observers),
    }
