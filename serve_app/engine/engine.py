"""The engine: a thread that runs the model for many requests at a time, within a fixed pool of bytes.

`Engine` is the public API and holds the only lock. Under it, the `Scheduler` decides. Without it, the `ModelRunner`
computes and callbacks are called, so that a submission waits for neither. See scheduler.py for the life of a request.
"""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel
from serve_app.engine.chunk_size import DEFAULT_MAX_BATCHED_TOKENS, DEFAULT_PREFILL_DECODE_RATIO, ChunkSizePolicy
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.sequence import Request
from serve_app.engine.types import DrainingError, EngineRequest, EngineState, OutputCallback, RequestHandle

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine.

    Args:
        pool_bytes: for KV caches.
        max_waiting: requests that may wait in the queue.
        max_batched_tokens: prompt tokens of a step that also decodes.
        prefill_decode_ratio: time of a step's prompt tokens relative to its decode batch.
        tpot_target: seconds that a step which also decodes may take, instead of the ratio.
        prefix_caching: whether prompts continue the caches of earlier ones, under plans that prefill in chunks.
    """

    pool_bytes: int
    max_waiting: int = 64
    max_batched_tokens: int = DEFAULT_MAX_BATCHED_TOKENS
    prefill_decode_ratio: float = DEFAULT_PREFILL_DECODE_RATIO
    tpot_target: float | None = None
    prefix_caching: bool = True


class Engine:
    """Runs requests under a plan: first come, first served, as many together as fit into the pool.

    All methods may be called from any thread.

    Raises:
        UserError: the plan was made for another model, or the pool does not hold one sequence.
    """

    def __init__(self, loaded: LoadedModel, plan: BudgetPlan, config: EngineConfig) -> None:
        self.config = config
        chunk_size = ChunkSizePolicy(config.max_batched_tokens, config.prefill_decode_ratio, config.tpot_target)
        self._scheduler = Scheduler(
            loaded, plan, config.pool_bytes, config.max_waiting, chunk_size, prefix_caching=config.prefix_caching
        )
        self._runner = ModelRunner(loaded)
        self._changed = threading.Condition()  # the lock of the scheduler and of the two flags
        self._draining = self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def plan(self) -> BudgetPlan:
        """The active plan."""
        return self._scheduler.plan

    def submit(self, *requests: tuple[EngineRequest, OutputCallback]) -> Sequence[RequestHandle]:
        """Queue requests, all or none of them. Each callback receives its request's outputs on the engine's thread.

        Raises:
            RequestRejected: the queue is full, a request can never fit, or the engine drains or has died.
        """
        with self._changed:
            if self._draining or self._closed or not self._thread.is_alive():
                raise DrainingError
            queued = [Request(params, self._scheduler.plan, callback) for params, callback in requests]
            self._scheduler.add(queued)
            self._changed.notify()
        return queued

    def pin_prefix(self, prompt: Sequence[int]) -> None:
        """Keep this prompt in the prefix cache, so that prompts that start with it are prefilled from there.

        Raises:
            UserError: the prompt is empty, or the pool does not hold it and one sequence.
        """
        with self._changed:
            self._scheduler.pin_prefix(tuple(prompt))
            self._changed.notify()

    def swap_plan(self, plan: BudgetPlan) -> None:
        """Make a plan active: new requests run under it, running ones end under theirs. Raises UserError as `__init__`.

        A waiting request that the pool would not hold under this plan runs under the one it was submitted under.
        """
        with self._changed:
            self._scheduler.swap_plan(plan)
            self._changed.notify()

    def drain(self) -> None:
        """Take no more requests; those that run or wait are finished first."""
        with self._changed:
            self._draining = True

    def close(self) -> None:
        """End the thread after the step under way. Requests that have not finished are aborted."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def state(self) -> EngineState:
        """Return a snapshot of what the engine is doing."""
        with self._changed:
            return replace(self._scheduler.state(), draining=self._draining, alive=self._thread.is_alive())

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
        except Exception:
            logger.exception("the engine died")
        with self._changed:
            self._closed = True
            self._scheduler.abort_all()
        self._deliver_outputs()

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._scheduler.has_work)
            return not self._closed

    def _step(self) -> None:
        """Generate a token of every running sequence, and prefill a part of one prompt."""
        self._compute()
        self._deliver_outputs()
        measurement = self._scheduler.measure()
        with self._changed:
            self._scheduler.process_measurement(measurement)
        self._deliver_outputs()

    def _compute(self) -> None:
        """Run the forward of a step. Nothing refers to the sequences that end once this returns."""
        with self._changed:
            scheduled = self._scheduler.schedule()
        self._deliver_outputs()  # of requests that ended before they ran
        started_at = time.perf_counter()
        output = self._runner.step(scheduled.batch, scheduled.job, scheduled.prompt_tokens)
        with self._changed:
            self._scheduler.process(scheduled, output, time.perf_counter() - started_at)

    def _deliver_outputs(self) -> None:
        """Call the callbacks without the lock. One that raises fails its request, which gets no other output."""
        while True:
            with self._changed:
                outputs = self._scheduler.take_outputs()
            if not outputs:
                return
            failed: set[Request] = set()
            for request, output in outputs:
                if request in failed:
                    continue
                try:
                    request.emit(output)
                except Exception as error:
                    failed.add(request)
                    with self._changed:
                        self._scheduler.fail(request, error)
