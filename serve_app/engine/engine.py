"""The engine: a thread that runs the model for many requests at a time, inside the bytes that it was given."""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from baklava.errors import UserError
from baklava.eviction import eviction_of
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel
from serve_app.engine.chunk_size import BESIDE, Pace
from serve_app.engine.memory import BrokenPromiseError
from serve_app.engine.prefill import needs, transient
from serve_app.engine.prefix_cache import Snapshots
from serve_app.engine.sampler import Sampling
from serve_app.engine.scheduler import Stepper
from serve_app.engine.sequence import Request
from serve_app.engine.types import OutputCallback, DrainingError, RequestHandle, QueueFullError, EngineState, TooLargeError, EngineRequest

__all__ = ["BrokenPromiseError", "Engine", "Limits"]

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Limits:
    """What an engine may take: bytes for KV caches, requests that wait, and what of a prompt a step takes.

    Beside decoding that are at most `chunk` tokens, and about `beside` times as long as the decode batch.
    """

    pool_bytes: int
    waiting: int = 64
    chunk: int = 512
    beside: float = BESIDE


class Engine:
    """Runs requests inside a plan: first come, first served, as many together as have room.

    A step is a token of every running sequence, and a part of one prompt. A request is let in when all the bytes that
    it can ever need are there, so nothing is preempted, and nothing runs out of memory.

    Raises:
        UserError: the plan was made for another model, or the pool does not hold one sequence.
    """

    def __init__(self, loaded: LoadedModel, plan: BudgetPlan, limits: Limits) -> None:
        self.limits, self._loaded = limits, loaded
        self._check(plan, [])
        self.plan, self._snapshots = plan, Snapshots(plan)
        self._changed = threading.Condition()
        self._queue: deque[Request] = deque()
        self._draining = self._closed = False
        self._stepper = Stepper(loaded, limits.pool_bytes, Pace(limits.chunk, limits.beside), self._snapshots)
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, *asked: tuple[EngineRequest, OutputCallback]) -> Sequence[RequestHandle]:
        """Take requests in, all or none of them; the events of each come to it on the engine's thread.

        Raises:
            Refusal: the queue is full, a request can never fit, or the engine drains or has died.
        """
        with self._changed:
            requests = [Request(work, self.plan, deliver) for work, deliver in asked]
            self._check_open()
            for request in requests:
                self._check_size(request)
            self._check_queue(len(requests))
            self._queue.extend(requests)
            self._changed.notify()
        return requests

    def declare(self, prompt: Sequence[int]) -> None:
        """Keep a snapshot of this prompt, from which requests that begin with it go on.

        Raises:
            UserError: the prompt is empty, or the pool does not hold its snapshot and one sequence.
        """
        prefix = tuple(prompt)
        if not prefix:
            raise UserError("a declared prompt of 0 tokens is the beginning of nothing; give at least one token")
        with self._changed:
            self._check(self.plan, [*self._snapshots.declared, prefix])
            self._snapshots.declare(prefix)
            self._queue.appendleft(_snapshot_request(prefix, self.plan))
            self._changed.notify()

    def swap(self, plan: BudgetPlan) -> None:
        """New requests live inside this plan, those under way end inside theirs. Raises UserError as `__init__`.

        A request that waits, and that the pool would not hold inside this plan, lives inside the one that it came with.
        """
        with self._changed:
            self._check(plan, self._snapshots.declared)
            self.plan = plan
            for prefix in reversed(self._snapshots.declared):
                self._queue.appendleft(_snapshot_request(prefix, plan))
            self._changed.notify()

    def drain(self) -> None:
        """Take no more requests; those under way and those that wait are ended first."""
        self._draining = True

    def close(self) -> None:
        """End the thread once the step under way is done; what is still to be answered is told that it will not be."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def state(self) -> EngineState:
        """What it does now; may be called from any thread."""
        waiting, present = self._waiting(), len(self._stepper.present)
        state = self._stepper.state
        return replace(
            state,
            running=max(state.running if present else 0, present),
            waiting=waiting,
            draining=self._draining,
            alive=self._thread.is_alive(),
            plan=self.plan.digest,
        )

    def _waiting(self) -> int:
        return sum(not request.internal for request in tuple(self._queue))

    def _check(self, plan: BudgetPlan, declared: Sequence[Sequence[int]]) -> None:
        plan.check_fits(self._loaded.identity, self._loaded.geometry)
        eviction_of(plan.eviction)
        entering = transient(self._loaded, plan, max(map(len, declared), default=0))
        needed = plan.bytes_for(self._loaded.max_length) + _snapshot_bytes(plan, declared) + entering
        if needed > self.limits.pool_bytes:
            raise UserError(
                f"the pool of {self.limits.pool_bytes} bytes does not hold one sequence of {self._loaded.max_length} "
                f"tokens and what is declared, which are {needed} bytes; give it more, or choose a smaller plan"
            )

    def _check_queue(self, more: int) -> None:
        waiting = self._waiting()
        if waiting and waiting + more > self.limits.waiting:
            self._stepper.refused += more
            raise QueueFullError(self._stepper.pace.wait(waiting))
        if more > max(1, self.limits.waiting):
            self._stepper.refused += more
            raise TooLargeError(f"The request has {more} prompts, and at most {self.limits.waiting} may wait here.")

    def _check_open(self) -> None:
        if self._draining or self._closed or not self._thread.is_alive():
            raise DrainingError

    def _check_size(self, request: Request) -> None:
        needed = needs(self._loaded, self.plan, request, Snapshots(self.plan)).total
        room = self.limits.pool_bytes - _snapshot_bytes(self.plan, self._snapshots.declared)
        if needed > room:
            self._stepper.refused += 1
            raise TooLargeError(
                f"The request needs {needed} bytes of KV cache, more than the {room} that this server has for "
                "requests; shorten the prompt, or ask for fewer tokens or fewer continuations."
            )

    def _loop(self) -> None:
        try:
            while self._wait():
                self._stepper.step(self._queue, self._changed, lambda: self.plan)
        except Exception:
            logger.exception("the engine died")
        with self._changed:
            self._closed = True
            self._stepper.give_up(self._queue)

    def _wait(self) -> bool:
        """Wait for something to do; whether there is more to come."""
        with self._changed:
            while not (self._closed or self._queue or self._stepper.busy):
                self._changed.wait()
            return not self._closed


def _snapshot_bytes(plan: BudgetPlan, declared: Sequence[Sequence[int]]) -> int:
    return sum(plan.bytes_for(len(prefix)) for prefix in declared)


def _snapshot_request(prefix: tuple[int, ...], plan: BudgetPlan) -> Request:
    """The engine's own request for the snapshot of a declared prompt."""

    def told(event: object) -> None:
        if isinstance(event, Exception):
            logger.error("a declared prompt of %d tokens has no snapshot: %s", len(prefix), event)

    return Request(EngineRequest(prefix, Sampling(max_tokens=0)), plan, told, internal=True)
