"""Runs the model: one prefill chunk, or one decode batch with the sampling of its tokens. Keeps no queue."""

import time
from collections.abc import Sequence as Sequences

import torch

from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.decode import decode_step
from baklava.runtime.logprobs import PromptLogprobsTask
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import ChunkedPrefill, PrefillResult, PrefillTask, make_prefill_task
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
    """

    def __init__(
        self, plan: BudgetPlan, request: Request, prefix: Prefix | None = None, entry: PrefixCacheEntry | None = None
    ) -> None:
        self.plan, self.request, self.prefix = plan, request, prefix
        self.cached_tokens = len(prefix) if prefix and entry else 0
        self.admitted_at = time.monotonic()
        self.new_entry: PrefixCacheEntry | None = None
        self._entry = entry
        self._task: PrefillTask | None = None
        self._fills_prefix_cache = prefix is not None and entry is None
        self._prefix_tokens = 0  # processed by an earlier task

    def step(self, loaded: LoadedModel, tokens: int) -> PrefillResult | None:
        """Process about `tokens` more. Return the cache with the whole prompt and its last logits once it is done."""
        if self._task is None:
            self._task = self._first_task(loaded)
        result = self._task.step(tokens)
        if result is None or not self._fills_prefix_cache:
            return result
        self.new_entry, self._fills_prefix_cache = PrefixCacheEntry(*result), False
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

    @property
    def holds_entry(self) -> bool:
        """Whether the prefix cache entry that it starts from is still to be copied."""
        return self._entry is not None

    @property
    def prompt_logprobs(self) -> tuple[Logprob | None, ...]:
        """One per prompt token if they were requested."""
        if not isinstance(self._task, PromptLogprobsTask):
            return ()
        return (None, *(Logprob(scored.id, scored.logprob, scored.top) for scored in self._task.token_logprobs))

    @property
    def num_processed(self) -> int:
        """Tokens processed so far; other work is counted as the tokens that take as long."""
        return self._prefix_tokens + (self._task.num_processed if self._task else 0)

    @property
    def nbytes(self) -> int:
        """Bytes allocated between two steps."""
        return self._task.nbytes if self._task else 0


class ModelRunner:
    """Runs the forwards of an engine, on its thread."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    @torch.inference_mode()
    def prefill(self, job: PrefillJob, tokens: int) -> list[tuple[Sequence, TokenOutput]] | None:
        """Run one prefill chunk of about `tokens`.

        Returns:
            None while the prompt is not done; then the request's sequences with their first tokens, none of them if
            no token was to be generated.
        """
        result = job.step(self._loaded, tokens)
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

    @torch.inference_mode()
    def decode(self, batch: Sequences[Sequence]) -> list[TokenOutput | Exception]:
        """Feed each sequence's last token in one forward and sample its next token.

        If the forward fails, every sequence gets the exception; if sampling fails, the sequence that it failed for.
        """
        try:
            logits = decode_step(
                self._loaded, [sequence.cache for sequence in batch], [sequence.last_token for sequence in batch]
            )
            return sample_batch(logits, batch)
        except Exception as error:
            return [error] * len(batch)
