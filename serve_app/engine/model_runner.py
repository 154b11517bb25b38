"""Runs the model: a decode batch and a part of a prompt, and samples their tokens. Keeps no queue."""

import time
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import torch

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.batched_forward import batched_forward
from baklava.runtime.logprobs import PromptLogprobsTask
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import (
    ChunkedPrefill,
    Logits,
    PrefillResult,
    PrefillTask,
    TokenChunk,
    make_prefill_task,
)
from serve_app.engine.automatic_prefix_cache import ChunkEnd
from serve_app.engine.layerwise_forward import LayerwiseForward
from serve_app.engine.prefix_cache import Prefix, PrefixCacheEntry
from serve_app.engine.sampler import SamplingState
from serve_app.engine.sequence import Request, Sequence, sample_batch
from serve_app.engine.types import Logprob, TokenOutput


class PrefillJob:
    """An admitted request whose prompt is being prefilled.

    A pinned prefix is always prefilled on its own and the rest of the prompt after it, so results do not depend on
    whether the prefix was in the cache. If it was not, the job leaves a `new_entry` for the cache.

    Args:
        plan: bounds the request's caches.
        prefix: the pinned prefix that the prompt starts with.
        entry: the prefix cache entry of `prefix`, if there is one.
        resumed: the cache of an earlier prompt that begins as this one does, and the end of what both share.
        to_keep: the ends of chunks at which a copy of the cache is to be left in `kept`.
    """

    def __init__(
        self,
        plan: BudgetPlan,
        request: Request,
        prefix: Prefix | None = None,
        entry: PrefixCacheEntry | None = None,
        resumed: tuple[ChunkEnd, BudgetedCache] | None = None,
        to_keep: Sequences[ChunkEnd] = (),
    ) -> None:
        self.plan, self.request, self.prefix = plan, request, prefix
        self.resumed_key = resumed[0].key if resumed else None
        self.kept: list[tuple[bytes, BudgetedCache]] = []
        self._resumed, self._to_keep = resumed, to_keep
        self._first_token = resumed[0].num_tokens if resumed else 0
        self.cached_tokens = len(prefix) if prefix and entry else self._first_token
        self.admitted_at = time.monotonic()
        self.new_entry: PrefixCacheEntry | None = None
        self._entry = entry
        self._task: PrefillTask | None = None
        self._forward: LayerwiseForward | None = None
        self._fills_prefix_cache = prefix is not None and entry is None
        self._prefix_tokens = 0  # processed by an earlier task

    def next_chunk(self, loaded: LoadedModel, tokens: int) -> TokenChunk | None:
        """Return at most `tokens` more to process in the forward of a step; None if `step` does what is next."""
        if self._task is None:
            self._task = self._first_task(loaded)
        chunk = None if self._forward else self._task.next_chunk(tokens)
        if chunk is None or len(chunk.ids) <= tokens:
            return chunk
        self._forward = LayerwiseForward(loaded, chunk)
        return None

    def process(self, loaded: LoadedModel, logits: Logits) -> PrefillResult | None:
        """Take the logits after `next_chunk`. Return the cache with the whole prompt and its last logits once done."""
        assert self._task is not None
        return self._end_prefix(loaded, self._task.process(logits))

    def step(self, loaded: LoadedModel, tokens: int) -> PrefillResult | None:
        """Do about as much as `tokens` more would take, in forwards of its own. Return the same as `process`."""
        assert self._task is not None
        if self._forward is None:
            return self._end_prefix(loaded, self._task.step(tokens))
        logits = self._forward.run(tokens)
        if logits is None:
            return None
        self._forward = None
        return self.process(loaded, logits)

    @property
    def is_paused(self) -> bool:
        """Whether a forward of its own is under way, of which `step` runs some layers."""
        return self._forward is not None

    def _end_prefix(self, loaded: LoadedModel, result: PrefillResult | None) -> PrefillResult | None:
        """Go on with the rest of the prompt after its prefix, of which this is the result."""
        self._keep_copy()
        if result is None or not self._fills_prefix_cache:
            return result
        assert self._task is not None
        cache, logits = result
        # A copy, since a view would keep the logits of the whole step
        self.new_entry, self._fills_prefix_cache = PrefixCacheEntry(cache, logits.clone()), False
        params = self.request.params
        if self.prefix == params.prompt and not params.sampling_params.max_tokens:
            return result
        self._prefix_tokens = self._task.num_processed
        self._task = self._task_after(loaded, self.new_entry)
        return None

    def _first_task(self, loaded: LoadedModel) -> PrefillTask:
        params, max_tokens = self.request.params, self.request.max_tokens
        if params.prompt_logprobs is not None:
            return PromptLogprobsTask(loaded, self.plan, params.prompt, max_tokens, params.prompt_logprobs)
        if self._resumed is not None:
            (end, earlier), self._resumed = self._resumed, None  # the prefix cache may drop it from now on
            cache, rest = earlier.copy(max_tokens), params.prompt[end.num_tokens :]
            return ChunkedPrefill(loaded, cache, None, rest, self._chunk_size)
        if self.prefix is None:
            return make_prefill_task(loaded, self.plan, params.prompt, max_tokens)
        if self._entry is None:
            return make_prefill_task(loaded, self.plan, self.prefix, len(self.prefix))
        return self._task_after(loaded, self._entry)

    def _task_after(self, loaded: LoadedModel, entry: PrefixCacheEntry) -> PrefillTask:
        assert self.prefix is not None
        rest = self.request.params.prompt[len(self.prefix) :]
        cache = entry.cache.copy(self.request.max_tokens)
        self._entry = None  # the prefix cache may drop it from now on
        return ChunkedPrefill(loaded, cache, entry.logits, rest)

    def _keep_copy(self) -> None:
        """Copy the cache if it is at the end of a chunk that is to be kept."""
        if isinstance(self._task, ChunkedPrefill):
            tokens = self._first_token + self._task.num_processed
            self.kept += [(end.key, self._task.copy_cache()) for end in self._to_keep if end.num_tokens == tokens]

    @property
    def _chunk_size(self) -> int:
        assert self.plan.prefill.chunk_size is not None
        return self.plan.prefill.chunk_size

    @property
    def holds_entry(self) -> bool:
        """Whether the cache of a prefix or of an earlier prompt, from which it starts, is still to be copied."""
        return self._entry is not None or self._resumed is not None

    @property
    def prompt_logprobs(self) -> tuple[Logprob | None, ...]:
        """One per prompt token if they were requested."""
        if not isinstance(self._task, PromptLogprobsTask):
            return ()
        return (None, *(Logprob(scored.id, scored.logprob, scored.top) for scored in self._task.token_logprobs))

    @property
    def num_left(self) -> int:
        """Tokens of the prompt that are neither cached nor processed; below 1 if only other work is left."""
        before = len(self.prefix) if self.prefix and (self.cached_tokens or self._prefix_tokens) else self._first_token
        return len(self.request.params.prompt) - before - (self.num_processed - self._prefix_tokens)

    @property
    def num_processed(self) -> int:
        """Tokens processed so far; other work is counted as the tokens that take as long."""
        return self._prefix_tokens + sum(part.num_processed for part in (self._task, self._forward) if part)

    @property
    def nbytes(self) -> int:
        """Bytes allocated between two steps."""
        return self._task.nbytes if self._task else 0


@dataclass(frozen=True)
class StepOutput:
    """What one step computed.

    Args:
        tokens: Of each sequence of the decode batch, its next token or the exception that it failed with.
        started: The sequences of a prompt that is done, with their first tokens; none of them if no token was to be
            generated. None while a prompt is not done.
        prefill_error: What the prompt failed with.
        prompt_tokens: Prompt tokens that were processed, of layers a share; None if something else was done.
        prompt_seconds: Seconds that they took by themselves; None if they shared the decode batch's forward.
    """

    tokens: Sequences[TokenOutput | Exception]
    started: Sequences[tuple[Sequence, TokenOutput]] | None = None
    prefill_error: Exception | None = None
    prompt_tokens: int | None = 0
    prompt_seconds: float | None = None


class ModelRunner:
    """Runs the forwards of an engine, on its thread."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    @torch.inference_mode()
    def step(self, batch: Sequences[Sequence], job: PrefillJob | None, tokens: int) -> StepOutput:
        """Feed each sequence's last token and about `tokens` of a prompt, and sample the next tokens.

        All of it is one forward, unless the next chunk of the prompt is longer.

        If the forward fails, all of them get the exception. If attention to the prompt, a sliding layer's attention or
        sampling fails, only the prompt or the sequence that it failed for does.
        """
        num_processed = 0 if job is None else job.num_processed
        try:
            chunk = None if job is None else job.next_chunk(self._loaded, tokens)
        except Exception as raised:
            return StepOutput(self._forward(batch, None)[0], prefill_error=raised)
        outputs, logits, error = self._forward(batch, chunk)
        if job is None:
            return StepOutput(outputs)
        prompt_tokens, is_paused = None if chunk is None else len(chunk.ids), job.is_paused
        if error is not None:
            return StepOutput(outputs, prefill_error=error, prompt_tokens=prompt_tokens)
        try:
            started_at = time.perf_counter()
            result = job.step(self._loaded, tokens) if logits is None else job.process(self._loaded, logits)
            if not is_paused:
                return StepOutput(outputs, self._start(job, result), prompt_tokens=prompt_tokens)
            if self._loaded.device.type == "cuda":
                torch.cuda.synchronize()  # else the next decode batch would wait for these layers
            seconds, prompt_tokens = time.perf_counter() - started_at, job.num_processed - num_processed
            return StepOutput(outputs, self._start(job, result), prompt_tokens=prompt_tokens, prompt_seconds=seconds)
        except Exception as raised:
            return StepOutput(outputs, prefill_error=raised, prompt_tokens=prompt_tokens)

    def _forward(
        self, batch: Sequences[Sequence], chunk: TokenChunk | None
    ) -> tuple[Sequences[TokenOutput | Exception], Logits | None, Exception | None]:
        """Return the batch's next tokens, and the logits after the chunk, if there is one, or its exception."""
        last_tokens = torch.tensor([sequence.last_token for sequence in batch], device=self._loaded.device).split(1)
        chunks = [TokenChunk(sequence.cache, token) for sequence, token in zip(batch, last_tokens, strict=False)]
        if chunk is not None:
            chunks.append(chunk)
        if not chunks:
            return [], None, None
        try:
            logits, errors = batched_forward(self._loaded, chunks)
            outputs = sample_batch(logits[: len(batch)], batch) if batch else []
        except Exception as error:
            return [error] * len(batch), None, error if chunk is not None else None
        outputs = [errors.get(row, output) for row, output in enumerate(outputs)]
        return outputs, None if chunk is None else logits[len(batch) :], errors.get(len(batch))

    def _start(self, job: PrefillJob, result: PrefillResult | None) -> list[tuple[Sequence, TokenOutput]] | None:
        """Return the sequences of a prompt that is done, with their first tokens."""
        if result is None:
            return None
        request, (cache, logits) = job.request, result
        params = request.params.sampling_params
        if not params.max_tokens:
            return []
        end_ids = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | self._loaded.eos_token_ids
        caches = [cache, *(cache.copy(request.max_tokens) for _ in range(request.params.n - 1))]
        prompt, num_logprobs = request.params.prompt, request.params.logprobs
        batch = [
            Sequence(request, index, own, SamplingState(params, prompt, end_ids, index, num_logprobs), end_ids)
            for index, own in enumerate(caches)
        ]
        started = []
        for sequence, output in zip(batch, sample_batch(logits.expand(len(batch), -1), batch), strict=True):
            if isinstance(output, Exception):
                raise output
            started.append((sequence, output))
        return started
