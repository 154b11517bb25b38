"""The engine: a thread that runs the model for many requests."""

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from baklava.cache import BudgetedCache
from baklava.eviction import eviction_of
from baklava.model import LoadedModel
from baklava.plan import BudgetPlan
from baklava.prefilling import prefill
from serve_app.sampling import Sampler
from serve_app.work import Cancel, Deliver, DrainingError, QueueFullError, Started, State, Token, Work

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Limits:
    """What an engine may take: bytes for KV caches, requests that wait, tokens of a prompt per step."""

    pool_bytes: int
    waiting: int = 64
    chunk: int = 128


class Engine:
    """Runs requests inside a plan.

    Raises:
        UserError: the plan was made for another model, or the pool does not hold one sequence.
    """

    def __init__(self, loaded: LoadedModel, plan: BudgetPlan, limits: Limits) -> None:
        plan.check_fits(loaded.identity, loaded.geometry)
        eviction_of(plan.eviction)
        self.plan, self.limits, self._loaded = plan, limits, loaded
        self._queue: queue.Queue[tuple[Work, Deliver, threading.Event]] = queue.Queue()
        self._draining, self._running, self._most = False, 0, 0
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, work: Work, deliver: Deliver) -> Cancel:
        """Take a request in; its events come through `deliver`, on the engine's thread.

        Raises:
            Refusal: the queue is full, the request can never fit, or the engine drains.
        """
        if self._draining:
            raise DrainingError("The server is shutting down; ask another one.")
        if self._queue.qsize() >= self.limits.waiting:
            raise QueueFullError(5)
        gone = threading.Event()
        self._queue.put((work, deliver, gone))
        return gone.set

    def declare(self, prompt: Sequence[int]) -> None:
        """Keep a snapshot of this prompt, from which requests that begin with it go on."""

    def swap(self, plan: BudgetPlan) -> None:
        """New requests live inside this plan, those under way end inside theirs. Raises UserError as `__init__`."""
        plan.check_fits(self._loaded.identity, self._loaded.geometry)
        self.plan = plan

    def drain(self) -> None:
        """Take no more requests; those under way and those that wait are ended first."""
        self._draining = True

    def state(self) -> State:
        """What it does now; may be called from any thread."""
        busy = self._running * self.plan.bytes_per_sequence
        return State(
            running=self._running,
            waiting=self._queue.qsize(),
            pool_bytes=self.limits.pool_bytes,
            promised_bytes=busy,
            held_bytes=busy,
            most_bytes=self._most,
            snapshot_bytes=0,
            seen=0,
            kept=0,
            draining=self._draining,
            alive=self._thread.is_alive(),
            plan=self.plan.digest,
        )

    def _loop(self) -> None:
        while True:
            work, deliver, gone = self._queue.get()
            self._running = 1
            try:
                self._run(work, deliver, gone)
            except Exception as error:
                logger.exception("a request failed")
                deliver(error)
            self._running = 0

    @torch.inference_mode()
    def _run(self, work: Work, deliver: Deliver, gone: threading.Event) -> None:
        if time.monotonic() > work.deadline or gone.is_set():
            return
        sampling, device = work.sampling, self._loaded.device
        sampler = Sampler(sampling, device)
        ends = sampling.stop_ids if sampling.ignore_eos else sampling.stop_ids | self._loaded.end_ids
        cache, logits = prefill(self._loaded, self.plan, torch.tensor([list(work.prompt)], device=device))
        deliver(Started())
        for made in range(sampling.max_tokens):
            self._measure(cache)
            if made < sampling.min_tokens:
                logits[:, list(ends)] = -torch.inf
            token = sampler.draw(logits)
            finish = "stop" if token in ends else "length" if made + 1 == sampling.max_tokens else None
            deliver(Token(token, finish=finish))
            if finish or gone.is_set():
                return
            ids = torch.tensor([[token]], device=device)
            logits = self._loaded.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def _measure(self, cache: BudgetedCache) -> None:
        self._most = max(self._most, cache.nbytes)
