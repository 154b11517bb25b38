"""The engine without HTTP: what a step costs beside the model, what a prompt does to those who decode, who fits."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import mean
from typing import Any
from unittest.mock import patch

from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.decode import decode_step
from baklava.runtime.model_loader import LoadedModel
from benchmarks.serve.config import Asked
from benchmarks.serve.load_generator import spread
from serve_app.engine import model_runner
from serve_app.engine.engine import Engine, EngineConfig
from serve_app.engine.memory import max_sequences, prefill_workspace
from serve_app.engine.sampler import SamplingParams
from serve_app.engine.types import EngineOutput, EngineRequest, TokenOutput


class Waiter:
    """The events of one request, with the times of its tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.error: Exception | None = None
        self.begun, self.ended = threading.Event(), threading.Event()

    def take(self, event: EngineOutput) -> None:
        """What the engine delivers to."""
        if isinstance(event, TokenOutput):
            self.times.append(time.perf_counter())
            self.begun.set()
        if isinstance(event, Exception):
            self.error = event
        if isinstance(event, Exception) or (isinstance(event, TokenOutput) and event.finish_reason):
            self.begun.set()
            self.ended.set()


@contextmanager
def engine_of(loaded: LoadedModel, plan: BudgetPlan, pool: int) -> Iterator[Engine]:
    """An engine for as long as the block lasts."""
    engine = Engine(loaded, plan, EngineConfig(pool, max_waiting=1 << 16))
    try:
        yield engine
    finally:
        engine.close()


def ask(engine: Engine, prompt: Sequence[int], tokens: int) -> Waiter:
    """A request for exactly so many tokens."""
    waiter = Waiter()
    engine.submit((EngineRequest(tuple(prompt), SamplingParams(tokens, temperature=0, ignore_eos=True)), waiter.take))
    return waiter


def overhead(loaded: LoadedModel, plan: BudgetPlan, asked: Asked, prompt: Sequence[int]) -> dict[str, float]:
    """Seconds of an engine's decode step, and of the model's part of it: the forward of the batch, with its caches."""
    pool = 2 * (asked.batch + 1) * plan.bytes_per_sequence + prefill_workspace(loaded, plan, len(prompt) + 1)
    forwards: list[float] = []

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        made = decode_step(*arguments)
        forwards.append(time.perf_counter() - began)
        return made

    with engine_of(loaded, plan, pool) as engine, patch.object(model_runner, "decode_step", timed):
        engine.pin_prefix(prompt)  # so that all of them decode together from the first step on
        waiters = [ask(engine, (*prompt, 1 + place), asked.steps + place) for place in range(asked.batch)]
        for waiter in waiters:
            waiter.ended.wait()
    # All run together from the last one's first token until the first one's last.
    last = [moment for moment in waiters[-1].times if moment <= waiters[0].times[-1]]
    whole = mean(after - before for before, after in pairwise(last))  # some steps evict, and others do not
    model = mean(forwards[-asked.steps : -asked.batch])
    return {"batch": asked.batch, "step": whole, "model": model, "overhead": whole / model - 1}


def beside(loaded: LoadedModel, plan: BudgetPlan, asked: Asked, prompt: Sequence[int], long: Sequence[int]) -> Any:
    """Seconds between tokens of a sequence, alone and while a long prompt enters."""
    pool = plan.bytes_per_sequence * 4 + prefill_workspace(loaded, plan, len(long) + 1)
    with engine_of(loaded, plan, pool) as engine:
        waiter = ask(engine, prompt, 4 * asked.steps + len(long) // 8)
        waiter.begun.wait()
        while len(waiter.times) < 2 * asked.steps:
            time.sleep(0.01)
        entering = ask(engine, long, 1)
        began = time.perf_counter()
        entering.ended.wait()
        ended = time.perf_counter()
        waiter.ended.wait()
    gaps = [(after, after - before) for before, after in pairwise(waiter.times)]
    idle = spread([gap for moment, gap in gaps if moment < began or moment > ended + 1])
    busy = spread([gap for moment, gap in gaps if began < moment <= ended])
    return {"tokens": len(long), "idle": idle, "beside": busy, "seconds": ended - began}


def fits(loaded: LoadedModel, plan: BudgetPlan, full: BudgetPlan, asked: Asked) -> list[dict[str, int]]:
    """How many sequences fit into the pool, by their tokens: computed, as the engine admits them."""
    itemsize = loaded.model.dtype.itemsize
    return [
        {"tokens": tokens}
        | {name: max_sequences(own, asked.pool, tokens, itemsize) for name, own in (("full", full), ("plan", plan))}
        for tokens in asked.contexts
    ]


def together(loaded: LoadedModel, plan: BudgetPlan, asked: Asked, prompt: Sequence[int]) -> dict[str, int]:
    """Fill the pool with sequences that begin alike, and count: who ran together, what was held, who failed.

    All begin from one snapshot, as prefilling hundreds of prompts would take hours and hold the same bytes.
    """
    most, held = 0, 0
    with engine_of(loaded, plan, asked.pool) as engine:
        engine.pin_prefix(prompt)
        own = plan.bytes_for(len(prompt) + 1 + asked.generated)
        waiters = [ask(engine, (*prompt, 1 + place), asked.generated) for place in range(asked.pool // own + 2)]
        while not all(waiter.ended.wait(0.05) for waiter in waiters):
            state = engine.state()
            most, held = max(most, state.running), max(held, state.allocated_bytes)
        held = max(held, engine.state().peak_bytes)
    failed = sum(waiter.error is not None for waiter in waiters)
    return {"asked": len(waiters), "together": most, "held": held, "pool": asked.pool, "failed": failed}
