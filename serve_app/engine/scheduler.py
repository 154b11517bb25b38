"""The steps of the engine: who comes in, who decodes, who is done, and what all of them hold."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from threading import Condition

import torch

from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.decode import decode_step
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import PrefillResult, Logits
from serve_app.engine.chunk_size import Pace
from serve_app.engine.memory import BrokenPromiseError, Meter, Pool, check_promise
from serve_app.engine.prefill import Entrance, Needs, needs
from serve_app.engine.prefix_cache import Prefix, Snapshots
from serve_app.engine.sequence import Continuation, Request, begin
from serve_app.engine.types import (
    EngineStats,
    DeadlineError,
    DrainingError,
    FinishReason,
    RequestRejected,
    PrefillDone,
    EngineState,
    TokenOutput,
    TooLargeError,
)

logger = logging.getLogger("ray.serve")


class Stepper:
    """What the engine's thread does, one step at a time; nothing here may be touched by another one but `state`."""

    def __init__(self, loaded: LoadedModel, pool_bytes: int, pace: Pace, snapshots: Snapshots) -> None:
        self._loaded, self.pool, self.pace, self._snapshots = loaded, Pool(pool_bytes), pace, snapshots
        self.running: list[Continuation] = []
        self.entrance: Entrance | None = None
        self.present: set[Request] = set()  # from the moment that it leaves the queue until its end
        self._meter, self._most, self._counts = Meter(), 0, EngineStats()
        self.refused = 0
        self.state = self._measured({})

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self.running or self.entrance)

    @torch.inference_mode()
    def step(self, queue: deque[Request], changed: Condition, plan: Callable[[], BudgetPlan]) -> None:
        """A token of every running sequence, and a part of the prompt that enters.

        The queue changes only by who holds `changed`, and the plan that is in force for those who come in as well.
        """
        with changed:
            self._sweep(queue)
        self._decode()
        with changed:
            admitted = self._admitted(queue, plan())
        if admitted:
            self._admit(*admitted)
        self._enter()
        self._count(steps=1)
        self._measure()

    def give_up(self, queue: deque[Request]) -> None:
        """Tell everybody that there will be no answer."""
        error = DrainingError("The server has stopped; ask another one.")
        for request in {*(each.request for each in self.running), *self._entering(), *queue}:
            self._end(request, error)
        queue.clear()

    def _entering(self) -> list[Request]:
        return [self.entrance.request] if self.entrance else []

    def _sweep(self, queue: deque[Request]) -> None:
        """Let go of what is cancelled, late or complete."""
        for request in {*(each.request for each in self.running), *self._entering()}:
            if request.cancelled or request.late:
                self._end(request, None if request.cancelled else DeadlineError(waiting=False))
        for each in [each for each in self.running if each.complete]:
            self.running.remove(each)
            self._shrink(each.request)
        for request in [each for each in queue if each.cancelled or each.late]:
            queue.remove(request)
            self._end(request, None if request.cancelled else DeadlineError(waiting=True))

    def _admitted(self, queue: deque[Request], plan: BudgetPlan) -> tuple[Request, BudgetPlan, Needs] | None:
        """The first in line, if there is room for all that it can ever hold and no other prompt is entering.

        It lives inside the plan in force; or, if not even the whole pool holds it so, inside the one that it came with.
        """
        if plan is not self._snapshots.plan:
            self._forget(self._snapshots.forget(plan))
        while queue and self.entrance is None:
            inside, wanted = plan, needs(self._loaded, plan, queue[0], self._snapshots)
            if not self.pool.fits(wanted.total):
                if self.running:
                    return None
                inside = queue[0].plan
                wanted = needs(self._loaded, inside, queue[0], Snapshots(inside))
            if self.pool.fits(wanted.total):
                self.present.add(queue[0])
                return queue.popleft(), inside, wanted
            self._end(queue.popleft(), TooLargeError("The request needs more bytes of KV cache than there are."))
        return None

    def _admit(self, request: Request, plan: BudgetPlan, wanted: Needs) -> None:
        """Promise a request its bytes, and let it begin to enter."""
        try:
            if wanted.snapshot:
                self.pool.promise(wanted.prefix, wanted.snapshot)
            self.pool.promise(request, wanted.caches + wanted.transient)
            self.entrance = Entrance(self._loaded, plan, request, wanted.prefix, self._snapshots)
        except Exception as error:
            self._end(request, error)

    def _enter(self) -> None:
        if self.entrance is None:
            return
        entrance, request = self.entrance, self.entrance.request
        try:
            with self.pace.entering(entrance):
                entered = entrance.step(self.pace.chunk(beside=bool(self.running)))
            if entered is not None:
                self._begin(entrance, entered)
        except Exception as error:
            self._end(request, error)

    def _begin(self, entrance: Entrance, entered: PrefillResult) -> None:
        """The prompt is in its cache: its continuations begin."""
        request, self.entrance = entrance.request, None
        self._forget_unborn()
        work = request.work
        finish: FinishReason | None = None if work.sampling_params.max_tokens else "length"
        if not request.internal:
            self._count(prompt_tokens=len(work.prompt), cached_tokens=entrance.cached_tokens)
        plan = entrance.plan.digest
        request.tell(PrefillDone(entrance.cached_tokens, entrance.prompt_logprobs, finish, entrance.admitted, plan))
        if finish:
            self._end(request)
            return
        cache, logits = entered
        begun = request.continuations(self._loaded, cache)
        self.running += begun
        self._shrink(request)
        self._told(request, zip(begun, begin(begun, logits), strict=True))

    def _decode(self) -> None:
        """One more token of every running sequence."""
        if not self.running:
            return
        batch = list(self.running)
        with self.pace.decoding():
            try:
                caches, last = [each.cache for each in batch], [each.last for each in batch]
                logits, failed = decode_step(self._loaded, caches, last)
            except Exception as error:  # whose fault it is cannot be told
                logits, failed = torch.empty(len(batch), 0), dict.fromkeys(range(len(batch)), error)
            likeliest = logits.argmax(-1).tolist() if logits.numel() else []
        self._deliver(batch, logits, likeliest, failed)
        if len(self.running) < len(batch):  # so that the bytes of those that have ended are free
            for each in self.running:
                each.cache.unshare()

    def _deliver(
        self, batch: Sequence[Continuation], logits: Logits, likeliest: Sequence[int], failed: Mapping[int, Exception]
    ) -> None:
        for row, each in enumerate(batch):
            if each.finish is not None or each not in self.running:
                continue  # a sibling has failed
            try:
                if row in failed:
                    raise failed[row]
                self._told(each.request, [(each, each.go_on(logits[row], likeliest[row]))])
            except Exception as error:
                self._end(each.request, error)

    def _told(self, request: Request, made: Iterable[tuple[Continuation, TokenOutput]]) -> None:
        """Deliver tokens; continuations that have ended give their bytes back at once."""
        for each, token in made:
            self._count(generation_tokens=1)
            if each.finish:
                self.running.remove(each)
            request.tell(token)
            if each.finish:
                self._shrink(request)

    def _shrink(self, request: Request) -> None:
        """Promise a request no more than its continuations that go on can need; without any, it has ended."""
        going_on = [each.cache.reserved_bytes for each in self.running if each.request is request]
        if going_on:
            self.pool.promise(request, sum(going_on))
        else:
            self._end(request)

    def _end(self, request: Request, error: Exception | None = None) -> None:
        """Free all that a request holds, and say why if it did not end by itself."""
        self.running = [each for each in self.running if each.request is not request]
        if self.entrance is not None and self.entrance.request is request:
            self.entrance = None
        self.pool.release(request)
        self.present.discard(request)
        self._forget_unborn()
        self._account(request, error)
        if error is not None:
            try:
                request.tell(error)
            except Exception:
                logger.exception("a request could not be told how it ended")

    def _forget_unborn(self) -> None:
        """Give back what was promised to snapshots that did not come to be."""
        if self.entrance is None:
            self._forget(self._snapshots.missing)

    def _forget(self, prefixes: Iterable[Prefix]) -> None:
        for prefix in prefixes:
            self.pool.release(prefix)

    def _account(self, request: Request, error: Exception | None) -> None:
        if request.internal:
            return
        if request.cancelled:
            self._count(cancelled=1)
        elif error is None:
            self._count(finished=1)
            self.pace.ended()
        else:
            self._count(failed=1)
            if not isinstance(error, RequestRejected):
                logger.error("a request failed", exc_info=error)

    def _count(self, **more: int) -> None:
        self._counts = replace(self._counts, **{name: getattr(self._counts, name) + by for name, by in more.items()})

    def _measure(self) -> None:
        """Measure what all caches hold; one that holds more than it promised fails its request, and no other."""
        held = {each: self._meter.held(each.cache) for each in self.running}
        for each, nbytes in held.items():
            try:
                check_promise(nbytes, each.cache.reserved_bytes)
            except BrokenPromiseError as error:
                if each in self.running:  # a sibling may have ended it
                    self._end(each.request, error)
        self._check_entrance()
        self._meter.turn([each.cache for each in self.running])
        self.state = self._measured({each: held[each] for each in self.running})

    def _check_entrance(self) -> None:
        if self.entrance is None:
            return
        request, held = self.entrance.request, self.entrance.nbytes
        own = self.pool.promised_to(request)
        if self.entrance.prefix in self._snapshots.missing:  # it holds what will be the snapshot
            own += self.pool.promised_to(self.entrance.prefix)
        try:
            check_promise(held, own)
        except BrokenPromiseError as error:
            self._end(request, error)

    def _measured(self, held: dict[Continuation, int]) -> EngineState:
        heads = self._loaded.geometry.kv_heads * len(self._loaded.geometry.budgetable)
        snapshots = self._snapshots.nbytes
        total = sum(held.values()) + snapshots + (self.entrance.nbytes if self.entrance else 0)
        self._most = max(self._most, total)
        return EngineState(
            running=len(self.running),
            waiting=0,
            pool_bytes=self.pool.total,
            reserved_bytes=self.pool.promised,
            allocated_bytes=total,
            peak_bytes=self._most,
            snapshot_bytes=snapshots,
            seen=heads * sum(each.cache.get_seq_length() for each in held),
            kept=sum(each.cache.num_entries for each in held),
            draining=False,
            alive=True,
            plan="",
            counts=replace(self._counts, refused=self.refused),
        )
