"""Decides who is admitted, who runs, and what memory is reserved for each.

The life of a request:

    Engine.submit ─> waiting ──────────> prefilling ─────────────> running ───────────────> finished
                     first come,         all bytes that it can     n sequences, one token   its bytes are
                     first served        ever need are reserved;   each per step            released
                                         one chunk per step

`Scheduler.add` rejects a request that can never fit or finds the queue full. `Scheduler._admit` moves the first one in
the queue to prefilling as soon as its memory can be reserved. So nothing is preempted, and nothing runs out of memory.
A request ends early if its client cancels it, its deadline passes, or its forward fails.

In every step the engine's thread calls `schedule`, then `process` with what the model runner computed, then `measure`
and `process_measurement`. The outputs for the requests accumulate until it takes them with `take_outputs`. All callers
hold the engine's lock, except for `measure`.
"""

import logging
from collections import deque
from collections.abc import Hashable, Iterable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, replace

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.storage import allocated_bytes
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel
from serve_app.engine.automatic_prefix_cache import AutomaticPrefixCache, ChunkEnd, chunk_ends
from serve_app.engine.chunk_size import ChunkSizePolicy
from serve_app.engine.memory import (
    ByteBudget,
    MemoryRequirement,
    ReservationExceededError,
    check_reservation,
    memory_required,
    prefill_workspace,
)
from serve_app.engine.model_runner import PrefillJob, StepOutput
from serve_app.engine.prefix_cache import Prefix, PrefixCache
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.sequence import Request, Sequence
from serve_app.engine.types import (
    DeadlineError,
    DrainingError,
    EngineOutput,
    EngineRequest,
    EngineState,
    EngineStats,
    FinishReason,
    PrefillDone,
    QueueFullError,
    RequestRejected,
    TokenOutput,
    TooLargeError,
)

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Measurement:
    """Bytes that the caches of the running sequences, and the prompt being prefilled, allocate after a step.

    `peak_bytes` is the most that slabs and recorded prompts together have ever allocated, at any moment of any step.
    """

    allocated_bytes: dict[Sequence, int]
    prefill_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class ScheduledStep:
    """What one step is to compute: a token of each sequence of the batch, and about this many tokens of a prompt."""

    batch: tuple[Sequence, ...]
    job: PrefillJob | None
    prompt_tokens: int


class Scheduler:
    """Owns the queue, the running sequences, the byte budget, the prefix caches and the active plan.

    The caches of earlier prompts take bytes of the pool that no request needs, and make way for those that do.

    Raises:
        UserError: the plan was made for another model, or the pool does not hold one sequence.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        plan: BudgetPlan,
        pool_bytes: int,
        max_waiting: int,
        chunk_size: ChunkSizePolicy,
        *,
        prefix_caching: bool = True,
    ) -> None:
        self._loaded, self._max_waiting, self._chunk_size = loaded, max_waiting, chunk_size
        self.budget = ByteBudget(pool_bytes)
        self._check_plan(plan, [])
        self.plan, self.prefix_cache = plan, PrefixCache(plan)
        self.earlier_prompts = AutomaticPrefixCache() if prefix_caching else None
        self._to_keep: set[bytes] = set()  # what is reserved for the copies that the prompt under way is to leave
        self.waiting: deque[Request] = deque()
        self.prefilling: PrefillJob | None = None
        self.running: list[Sequence] = []
        self.stats = EngineStats()
        self._peak_bytes = 0
        self._head_ends: tuple[Request, int, list[ChunkEnd]] | None = None
        self._head_requirement: tuple[Request, BudgetPlan, int, MemoryRequirement] | None = None
        self._outputs: list[tuple[Request, EngineOutput]] = []
        self._state = self._snapshot(Measurement({}, 0, 0))

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running or self.prefilling)

    # Requests and plans, as the engine's clients bring them

    def add(self, requests: Sequences[Request]) -> None:
        """Queue requests, all or none of them.

        Raises:
            RequestRejected: the queue is full, or a request can never fit.
        """
        prefix_bytes = self._prefix_bytes(self.plan, self.prefix_cache.pinned)
        for request in requests:
            required = memory_required(self._loaded, self.plan, request).total_bytes
            available = self.budget.total_bytes - prefix_bytes
            if required > available:
                self.stats.rejected += 1
                raise TooLargeError(
                    f"The request needs {required} bytes of KV cache, more than the {available} that this server has "
                    "for requests; shorten the prompt, or generate fewer tokens or fewer choices."
                )
        waiting = self._num_waiting
        if waiting and waiting + len(requests) > self._max_waiting:
            self.stats.rejected += len(requests)
            raise QueueFullError(self._chunk_size.estimate_wait_seconds(waiting))
        if len(requests) > max(1, self._max_waiting):
            self.stats.rejected += len(requests)
            raise TooLargeError(
                f"The request has {len(requests)} prompts, and at most {self._max_waiting} may wait here."
            )
        self.waiting.extend(requests)

    def pin_prefix(self, prefix: Prefix) -> None:
        """Prefill a prefix next, and keep its cache. Raises UserError if the pool does not hold it and one sequence."""
        if not prefix:
            raise UserError("a pinned prefix of 0 tokens starts every prompt; give at least one token")
        self._check_plan(self.plan, [*self.prefix_cache.pinned, prefix])
        self.prefix_cache.pin(prefix)
        self.waiting.appendleft(_prefix_request(prefix, self.plan))

    def swap_plan(self, plan: BudgetPlan) -> None:
        """Admit requests under this plan from now on, and prefill the pinned prefixes again. Raises UserError."""
        self._check_plan(plan, self.prefix_cache.pinned)
        self.plan = plan
        job = self.prefilling
        dropped: list[Hashable] = [*self.prefix_cache.invalidate(plan)]
        if self.earlier_prompts is not None:
            dropped += self.earlier_prompts.clear()
        source = job and (job.prefix or job.resumed_key)
        if job is not None and job.holds_entry and source in dropped:
            reserved = self.budget.reserved_by(job.request) + self.budget.reserved_by(source)
            self.budget.release(source)
            self.budget.reserve(job.request, reserved)  # until its prompt is done
        self._release(dropped)
        for prefix in reversed(self.prefix_cache.pinned):
            self.waiting.appendleft(_prefix_request(prefix, plan))

    # One step

    def schedule(self) -> ScheduledStep:
        """End what was cancelled or stopped or is late, admit the next request if it fits, and return the next step."""
        self._reap()
        self._admit()
        tokens_left = self.prefilling.num_left if self.prefilling else 0
        tokens = self._chunk_size.chunk_tokens(len(self.running), tokens_left)
        return ScheduledStep(tuple(self.running), self.prefilling if tokens else None, tokens)

    def process(self, scheduled: ScheduledStep, output: StepOutput, seconds: float) -> None:
        """Record what a step computed: tokens, a prompt that is done, and the requests that failed."""
        has_failed = output.prefill_error is not None or any(isinstance(each, Exception) for each in output.tokens)
        if output.prompt_tokens is not None and (scheduled.batch or output.prompt_tokens) and not has_failed:
            size = len(scheduled.batch)
            self._chunk_size.observe_step(size, output.prompt_tokens, seconds, output.prompt_seconds)
        self._process_tokens(scheduled.batch, output.tokens)
        if (job := scheduled.job) is None:
            return
        if output.prefill_error is None:
            try:
                self._process_prefill(job, output.started)
            except Exception as error:
                self.fail(job.request, error)
        elif not any(output.prefill_error is failed for failed in output.tokens):
            self.fail(job.request, output.prefill_error)
        else:  # with the whole forward, which is in the log
            self._finish(job.request, output.prefill_error)

    def _process_tokens(self, batch: Sequences[Sequence], outputs: Sequences[TokenOutput | Exception]) -> None:
        # A forward that fails does so with one exception for all requests of its batch.
        errors = {id(output): output for output in outputs if isinstance(output, Exception)}
        for error in errors.values():
            _log_failure(error)
        for sequence, output in zip(batch, outputs, strict=True):
            if sequence.request.has_ended:
                continue  # another of its sequences has failed
            if isinstance(output, Exception):
                self._finish(sequence.request, output)
            else:
                self._emit(sequence, output)

    def _process_prefill(self, job: PrefillJob, started: Sequences[tuple[Sequence, TokenOutput]] | None) -> None:
        """Keep a new prefix cache entry; once the prompt is done (`started`), its sequences run."""
        if job.new_entry and job.prefix:
            self.prefix_cache.put(job.prefix, job.new_entry)
            job.new_entry = None
        self._keep_copies(job)
        if started is None:
            return
        request, self.prefilling = job.request, None
        self._release_unbuilt_prefixes()
        if not request.is_internal:
            self.stats.prompt_tokens += len(request.params.prompt)
            self.stats.cached_tokens += job.cached_tokens
        finish: FinishReason | None = None if started else "length"
        done = PrefillDone(job.cached_tokens, job.prompt_logprobs, finish, job.admitted_at, job.plan.digest)
        self._outputs.append((request, done))
        if finish:
            self._finish(request)
            return
        self.running += [sequence for sequence, _ in started]
        self._release_unused(request)
        for sequence, token in started:
            self._emit(sequence, token)

    def _keep_copies(self, job: PrefillJob) -> None:
        """Keep the copies that a prompt has left, unless another plan has become active."""
        for key, cache in job.kept:
            if self.earlier_prompts is not None and cache.plan is self.plan:
                self.earlier_prompts.put(key, cache)
                self._to_keep.discard(key)
        job.kept.clear()

    def fail(self, request: Request, error: Exception) -> None:
        """Log an error, unless it is a rejection, and end the request with it if it has not ended yet."""
        if not isinstance(error, RequestRejected):
            _log_failure(error)
        if not request.has_ended:
            self._finish(request, error)

    def measure(self) -> Measurement:
        """Measure all caches. On the engine's thread this is safe without the lock, since no other changes them."""
        allocated = {sequence: sequence.cache.nbytes for sequence in self.running}
        prefill_bytes = self.prefilling.nbytes if self.prefilling else 0
        return Measurement(allocated, prefill_bytes, allocated_bytes().peak)

    def process_measurement(self, measurement: Measurement) -> None:
        """Fail the requests whose caches allocate more than they reserved, and no other."""
        self.stats.steps += 1
        for sequence, nbytes in measurement.allocated_bytes.items():
            try:
                check_reservation(nbytes, sequence.cache.reserved_bytes)
            except ReservationExceededError as error:
                if not sequence.request.has_ended:  # by another of its sequences
                    self.fail(sequence.request, error)
        if job := self.prefilling:
            reserved = self.budget.reserved_by(job.request)
            if job.prefix in self.prefix_cache.pending:  # the job allocates what will be the entry
                reserved += self.budget.reserved_by(job.prefix)
            try:
                check_reservation(measurement.prefill_bytes, reserved)
            except ReservationExceededError as error:
                self.fail(job.request, error)
        self._state = self._snapshot(measurement)

    def take_outputs(self) -> list[tuple[Request, EngineOutput]]:
        """Return the outputs since the last call, in order, for their requests' callbacks."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def state(self) -> EngineState:
        """Return the last measurement, with the queue and the running requests as they are now."""
        return replace(
            self._state,
            running=self._num_running,
            waiting=self._num_waiting,
            plan=self.plan.digest,
            counts=replace(self.stats),
        )

    def abort_all(self) -> None:
        """End every request, because the engine stops."""
        error = DrainingError("The server has stopped; send the request to another server.")
        for request in {*self._in_flight(), *self.waiting}:
            self._finish(request, error)
        self.waiting.clear()

    # Admission

    def _admit(self) -> None:
        """Admit the first request in the queue if all bytes that it can ever need can be reserved.

        It runs under the active plan. If even an idle pool does not hold it so, it runs under the plan that was active
        when it was submitted. One prompt is prefilled at a time.
        """
        while self.waiting and self.prefilling is None:
            request = self.waiting[0]
            try:
                job = self._reserve(request)
            except Exception as error:
                self.waiting.popleft()
                self.fail(request, error)
                continue
            if job is None:
                return  # until running requests end
            self.waiting.popleft()
            self.prefilling = job

    def _reserve(self, request: Request) -> PrefillJob | None:
        """Reserve what a request needs; None if that must wait for running requests. Raises TooLargeError."""
        plan, required = self.plan, self._requirement(request)
        ends = self._chunk_ends(request, required)
        self._match(ends)  # so that room is made at the cost of others
        if not self._make_room(required.total_bytes):
            if self.running:
                return None
            plan, required = request.plan, memory_required(self._loaded, request.plan, request)
        if not self._make_room(required.total_bytes):
            raise TooLargeError("The request needs more bytes of KV cache than there are.")
        prefix = required.prefix
        if required.prefix_bytes:
            self.budget.reserve(prefix, required.prefix_bytes)
        self.budget.reserve(request, required.cache_bytes + required.workspace_bytes)
        entry = None if prefix is None else self.prefix_cache.get(prefix)
        if plan is not self.plan:
            return PrefillJob(plan, request, prefix, entry)
        resumed = self._match(ends)
        return PrefillJob(plan, request, prefix, entry, resumed, self._reserve_copies(ends, resumed and resumed[0].key))

    def _chunk_ends(self, request: Request, required: MemoryRequirement) -> list[ChunkEnd]:
        """Return the ends of chunks at which the prompt may continue another one, or be continued; none if it may not.

        A pinned prefix is prefilled on its own, so the chunks after it are others.
        """
        chunk_size, params = self.plan.prefill.chunk_size, request.params
        if self.earlier_prompts is None or chunk_size is None or required.prefix or request.is_internal:
            return []
        if params.prompt_logprobs is not None:
            return []
        if self._head_ends is None or self._head_ends[:2] != (request, chunk_size):
            self._head_ends = request, chunk_size, chunk_ends(params.prompt, chunk_size, params.cache_salt)
        return self._head_ends[2]

    def _match(self, ends: Sequences[ChunkEnd]) -> tuple[ChunkEnd, BudgetedCache] | None:
        return self.earlier_prompts.match(ends) if self.earlier_prompts else None

    def _reserve_copies(self, ends: Sequences[ChunkEnd], source: bytes | None) -> list[ChunkEnd]:
        """Reserve the copies that a prompt is to leave for later ones, as far as there is room; return their ends.

        Args:
            ends: The ends of its chunks.
            source: The key of the cache that it continues, which must stay until it has been copied.
        """
        kept = []
        for end in self.earlier_prompts.worth_keeping(ends) if self.earlier_prompts else ():
            nbytes = self.plan.bytes_for(end.num_tokens)
            if self._make_room(nbytes, source):
                self.budget.reserve(end.key, nbytes)
                self._to_keep.add(end.key)
                kept.append(end)
        return kept

    def _make_room(self, nbytes: int, keep: bytes | None = None) -> bool:
        """Return whether bytes can be reserved, if need be after the caches of earlier prompts have been dropped.

        The least recently used go first. None goes if that would not suffice.
        """
        if self.budget.can_reserve(nbytes) or self.earlier_prompts is None:
            return self.budget.can_reserve(nbytes)
        can_free = sum(self.budget.reserved_by(key) for key in self.earlier_prompts.keys if key != keep)
        if not self.budget.can_reserve(nbytes - can_free):
            return False
        while not self.budget.can_reserve(nbytes):
            self.budget.release(self.earlier_prompts.evict(keep))
        return True

    def _requirement(self, request: Request) -> MemoryRequirement:
        """Return what the first request in the queue needs; computed once per plan and state of the prefix cache."""
        plan, version = self.plan, self.prefix_cache.version
        known = self._head_requirement
        if known and known[0] is request and known[1] is plan and known[2] == version:
            return known[3]
        prefix = None
        if request.params.prompt_logprobs is None:  # those of a pinned prefix are not kept
            prefix = self.prefix_cache.match(request.params.prompt)
        is_cached = prefix is not None and self.prefix_cache.get(prefix) is not None
        required = memory_required(self._loaded, plan, request, prefix, is_cached=is_cached)
        self._head_requirement = request, plan, version, required
        return required

    def _check_plan(self, plan: BudgetPlan, pinned: Sequences[Prefix]) -> None:
        loaded = self._loaded
        loaded.check_plan(plan)
        workspace = prefill_workspace(loaded, plan, max(map(len, pinned), default=0))
        required = plan.bytes_for(loaded.max_length) + self._prefix_bytes(plan, pinned) + workspace
        if required > self.budget.total_bytes:
            raise UserError(
                f"the pool of {self.budget.total_bytes} bytes does not hold one sequence of {loaded.max_length} tokens "
                f"and the pinned prefixes, which need {required} bytes; give it more, or choose a smaller plan"
            )

    def _prefix_bytes(self, plan: BudgetPlan, pinned: Sequences[Prefix]) -> int:
        return sum(plan.bytes_for(len(prefix)) for prefix in pinned)

    # Ends

    def _reap(self) -> None:
        """End requests that are cancelled or past their deadline, and sequences that were stopped."""
        for request in self._in_flight():
            if request.is_cancelled or request.is_expired:
                self._finish(request, None if request.is_cancelled else DeadlineError(was_waiting=False))
        for sequence in [one for one in self.running if one.request.is_stopped(one.index)]:
            self.running.remove(sequence)
            self._release_unused(sequence.request)
        for request in [one for one in self.waiting if one.is_cancelled or one.is_expired]:
            self.waiting.remove(request)
            self._finish(request, None if request.is_cancelled else DeadlineError(was_waiting=True))

    def _emit(self, sequence: Sequence, token: TokenOutput) -> None:
        """Record a token. A sequence that finishes with it gives its bytes back at once."""
        self.stats.generation_tokens += 1
        self._outputs.append((sequence.request, token))
        if token.finish_reason:
            self.running.remove(sequence)
            self._release_unused(sequence.request)

    def _release_unused(self, request: Request) -> None:
        """Reserve no more than a request's running sequences can need; without any, the request has finished."""
        reserved = [sequence.cache.reserved_bytes for sequence in self.running if sequence.request is request]
        if reserved:
            self.budget.reserve(request, sum(reserved))
        else:
            self._finish(request)

    def _finish(self, request: Request, error: Exception | None = None) -> None:
        """Release all that a request has and count it; the error is its last output if it did not end by itself."""
        request.has_ended = True
        self.running = [sequence for sequence in self.running if sequence.request is not request]
        if self.prefilling is not None and self.prefilling.request is request:
            self.prefilling = None
        self.budget.release(request)
        self._release_unbuilt_prefixes()
        if not request.is_internal:
            self._count_end(request, error)
        if error is not None:
            self._outputs.append((request, error))

    def _count_end(self, request: Request, error: Exception | None) -> None:
        if request.is_cancelled:
            self.stats.cancelled += 1
        elif error is None:
            self.stats.finished += 1
            self._chunk_size.on_finished()
        else:
            self.stats.failed += 1

    def _release_unbuilt_prefixes(self) -> None:
        """Release what is reserved for prefix cache entries whose prefill did not come to its end."""
        if self.prefilling is None:
            self._release([*self.prefix_cache.pending, *self._to_keep])
            self._to_keep.clear()

    def _release(self, owners: Iterable[Hashable]) -> None:
        for owner in owners:
            self.budget.release(owner)

    # Numbers

    def _in_flight(self) -> set[Request]:
        """All requests that were admitted and have not ended."""
        requests = {sequence.request for sequence in self.running}
        return requests | ({self.prefilling.request} if self.prefilling else set())

    @property
    def _num_running(self) -> int:
        return len(self.running) + (self.prefilling is not None)

    @property
    def _num_waiting(self) -> int:
        return sum(not request.is_internal for request in self.waiting)

    def _snapshot(self, measurement: Measurement) -> EngineState:
        geometry = self._loaded.geometry
        prefix_cache_bytes, cached_prompt_bytes, reserved = self.prefix_cache.nbytes, 0, self.budget.reserved_bytes
        if self.earlier_prompts is not None:
            cached_prompt_bytes = self.earlier_prompts.nbytes
            reserved -= sum(self.budget.reserved_by(key) for key in (*self.earlier_prompts.keys, *self._to_keep))
        allocated = {sequence: measurement.allocated_bytes[sequence] for sequence in self.running}
        total = sum(allocated.values()) + prefix_cache_bytes + cached_prompt_bytes
        total += measurement.prefill_bytes if self.prefilling else 0
        self._peak_bytes = max(self._peak_bytes, measurement.peak_bytes, total)
        seen_tokens = sum(sequence.cache.get_seq_length() for sequence in allocated)
        return EngineState(
            running=self._num_running,
            waiting=self._num_waiting,
            pool_bytes=self.budget.total_bytes,
            reserved_bytes=reserved,
            allocated_bytes=total,
            peak_bytes=self._peak_bytes,
            prefix_cache_bytes=prefix_cache_bytes,
            cached_prompt_bytes=cached_prompt_bytes,
            full_entries=geometry.kv_heads * len(geometry.full_attention_layers) * seen_tokens,
            cached_entries=sum(sequence.cache.num_entries for sequence in allocated),
            draining=False,
            alive=True,
            plan=self.plan.digest,
        )


def _log_failure(error: Exception) -> None:
    """Log an exception with its traceback, then drop that, since its frames refer to the caches of a failed batch."""
    logger.error("a request failed", exc_info=error)
    cause: BaseException | None = error
    while cause is not None and cause.__traceback__ is not None:
        cause = cause.with_traceback(None).__cause__ or cause.__context__


def _prefix_request(prefix: Prefix, plan: BudgetPlan) -> Request:
    """Return the engine's own request that fills the prefix cache."""

    def log_failure(output: object) -> None:
        if isinstance(output, Exception):
            logger.error("a pinned prefix of %d tokens is not in the prefix cache: %s", len(prefix), output)

    params = EngineRequest(prefix, SamplingParams(max_tokens=0))
    return Request(params, plan, log_failure, is_internal=True)
