"""Prefill: process a prompt into a budgeted cache, whole, in steps or in chunks; or record it for many plans."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from typing_extensions import override

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.recording_layer import Recording, RecordingCache, RecordingLayer
from baklava.cache.sliding_layer import SlidingLayer
from baklava.errors import UserError
from baklava.eviction import Eviction, build_eviction
from baklava.plan.budget_plan import BudgetPlan
from baklava.plan.geometry import unbudgeted_bytes
from baklava.runtime.context_reconstruction import add_reconstruction_scores
from baklava.runtime.model_loader import LoadedModel

CONTINUATION_CHUNK_TOKENS = 64
"""Tokens per forward of a text that continues a compressed cache. Which of its entries are kept depends on it."""

COMPRESS_LAYER_COST_TOKENS = 16
"""Cost of compressing one layer, expressed in prefill tokens."""

SCORE_BYTES = 4

Ids = Int[Tensor, "batch tokens"]
Logits = Float[Tensor, "batch vocabulary"]

PrefillResult = tuple[BudgetedCache, Logits]
"""The cache that holds a prompt, and the logits of the token after it."""


@dataclass(frozen=True)
class PrefilledPrompt:
    """A prompt that the full cache has attended to once, for any number of plans; no plan changes its `logits`."""

    ids: Ids
    recording: Recording
    logits: Logits


@torch.inference_mode()
def prefill_and_record(loaded: LoadedModel, ids: Ids, evictions: Sequence[Eviction]) -> PrefilledPrompt:
    """Prefill a prompt with the full cache, and score it for these eviction methods.

    Raises:
        UserError: a method repeats the prompt and the model's positions do not allow it.
    """
    cache = RecordingCache(loaded.geometry, evictions, ids.shape[1])
    logits = _forward(loaded, ids, cache)
    recording = cache.to_recording()
    if any(eviction.query_sample.uses_repetition for eviction in evictions):
        recording = add_reconstruction_scores(loaded, ids, recording)
    return PrefilledPrompt(ids, recording, logits)


@torch.inference_mode()
def compress(
    loaded: LoadedModel, prompt: PrefilledPrompt, plan: BudgetPlan, max_tokens: int | None = None
) -> PrefillResult:
    """Return what `prefill` would return, from a recorded prompt, which does not change.

    Raises:
        UserError: the plan is for another model, or its eviction method was not recorded.
    """
    loaded.check_plan(plan)
    if plan.prefill.mode == "dense":
        return BudgetedCache.from_recording(plan, prompt.recording, max_tokens), prompt.logits
    # The keys of a chunk depend on what the chunks before it left in the cache, so such a plan prefills by itself.
    return prefill(loaded, plan, prompt.ids, max_tokens=max_tokens)


def prefill(
    loaded: LoadedModel,
    plan: BudgetPlan,
    ids: Ids,
    attention_mask: Ids | None = None,
    max_tokens: int | None = None,
) -> PrefillResult:
    """Process prompts as their plan says, and return the cache and the logits of the next tokens.

    A plain forward with a `BudgetedCache` does the same for all methods but those that repeat the prompt. For a plan
    that prefills in chunks, this one also limits the activations to a chunk.

    Args:
        loaded: The model.
        plan: The plan of the cache.
        ids: Token ids, a prompt per row.
        attention_mask: 0 for padding, which must be on the left, and 1 for tokens.
        max_tokens: The largest number of tokens that any row will have in the end, as in `BudgetedCache`.

    Raises:
        UserError: the plan is for another model, the prompt is empty, or the plan's method cannot repeat it.
    """
    return make_prefill_task(loaded, plan, ids, max_tokens, attention_mask).run()


@dataclass(frozen=True, eq=False)
class TokenChunk:
    """New tokens of one sequence, and the cache that they continue."""

    cache: BudgetedCache | RecordingCache
    ids: Int[Tensor, " tokens"]


class PrefillTask(ABC):
    """A prompt that is processed step by step."""

    _cache: BudgetedCache
    _num_processed = 0

    def next_chunk(self, tokens: int) -> TokenChunk | None:
        """Return about `tokens` more tokens to process in a forward together with others, after which `process` is due.

        They are more if the plan's chunks are. None if this task has nothing for such a forward; then `step` does what
        is next.
        """
        return None

    def process(self, logits: Logits) -> PrefillResult | None:
        """Take the logits after the last token of `next_chunk`, and return the result once the prompt is complete."""
        raise NotImplementedError

    @abstractmethod
    def step(self, tokens: int) -> PrefillResult | None:
        """Process about `tokens` more tokens, and return the result once the prompt is complete.

        Raises:
            UserError: the prompt cannot be processed.
        """

    @property
    def num_processed(self) -> int:
        """Tokens processed so far; other work counts as the tokens that would take as long."""
        return self._num_processed

    @property
    def nbytes(self) -> int:
        """Bytes allocated between two steps."""
        return self._cache.nbytes

    def run(self) -> PrefillResult:
        """Process all that is left."""
        while (result := self.step(sys.maxsize)) is None:
            pass
        return result


def make_prefill_task(
    loaded: LoadedModel,
    plan: BudgetPlan,
    ids: Ids | Sequence[int],
    max_tokens: int | None = None,
    attention_mask: Ids | None = None,
) -> PrefillTask:
    """Return the task that processes prompts as their plan says.

    A chunked plan's prompts are processed in its chunks, and a dense plan's in steps of any size. The latter take one
    step only if the method repeats them, or if there is an attention mask.

    Raises:
        UserError: the plan is for another model, or the prompt is empty.
    """
    loaded.check_plan(plan)
    ids = ids if isinstance(ids, Tensor) else loaded.as_batch(ids)
    if ids.shape[1] == 0:
        raise UserError("a prompt of 0 tokens has no next token; give at least one token")
    if plan.prefill.chunk_size is not None:
        cache = BudgetedCache(plan, max_tokens)
        return ChunkedPrefill(loaded, cache, None, ids, plan.prefill.chunk_size, attention_mask)
    if _can_step(plan) and attention_mask is None:
        return DensePrefill(loaded, plan, ids, max_tokens)
    return OneShotPrefill(loaded, plan, ids, max_tokens, attention_mask)


def prefill_workspace_bytes(plan: BudgetPlan, tokens: int, itemsize: int) -> int:
    """Return the peak bytes that a prompt allocates in addition to its cache between two steps of its prefill.

    A prompt that is processed in one step allocates nothing between steps; if it is repeated, its full cache counts.

    Args:
        plan: The plan of the cache.
        tokens: Length of the prompt.
        itemsize: Bytes of one number of the model's dtype.
    """
    geometry, eviction = plan.geometry, build_eviction(plan.eviction)
    sample = eviction.query_sample
    if plan.prefill.chunk_size is not None or not (_can_step(plan) or sample.uses_repetition):
        return 0
    num_scores = 2 if sample.uses_repetition else int(plan.eviction.scored)  # of the prompt and of the repetition
    per_entry = 2 * geometry.head_dim * itemsize + num_scores * SCORE_BYTES
    queries = min(tokens, eviction.num_references) + (min(tokens, sample.window or 0) if sample.single_block else 0)
    per_layer = tokens * geometry.kv_heads * per_entry + queries * geometry.query_heads * geometry.head_dim * itemsize
    return len(geometry.full_attention_layers) * per_layer + unbudgeted_bytes(geometry, 8 * itemsize, tokens)


def _can_step(plan: BudgetPlan) -> bool:
    """Whether a dense prompt can be processed in steps: it is not repeated."""
    return not build_eviction(plan.eviction).query_sample.uses_repetition


def _forward(loaded: LoadedModel, ids: Ids, cache: Cache, **padding: Tensor) -> Logits:
    num_tokens = cache.get_seq_length() + ids.shape[1]
    output = loaded.model(ids, **padding, past_key_values=cache, use_cache=True, logits_to_keep=1)
    check_progress(cache, num_tokens)
    return output.logits[:, -1]


def check_progress(cache: Cache, num_tokens: int) -> None:
    """Raise RuntimeError unless every layer has seen this many tokens: a model may pass its cache over."""
    seen = [layer.get_seq_length() for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    if any(length != num_tokens for length in seen):
        raise RuntimeError(f"the layers of the cache have seen {seen} tokens of {num_tokens}; the plan was not applied")


def _padding(attention_mask: Ids | None, start: int, stop: int) -> dict[str, Tensor]:
    """Return what a forward of these columns needs for padding; positions count a row's tokens, as in generate()."""
    if attention_mask is None:
        return {}
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"attention_mask": attention_mask[:, :stop], "position_ids": positions[:, start:stop]}


class OneShotPrefill(PrefillTask):
    """Prompts that are processed in one step: in one forward, or in several if the method repeats them."""

    def __init__(
        self, loaded: LoadedModel, plan: BudgetPlan, ids: Ids, max_tokens: int | None, attention_mask: Ids | None = None
    ) -> None:
        self._loaded, self._plan, self._ids, self._max_tokens = loaded, plan, ids, max_tokens
        self._attention_mask = attention_mask

    @override
    @torch.inference_mode()
    def step(self, tokens: int) -> PrefillResult:
        loaded, mask, length = self._loaded, self._attention_mask, self._ids.shape[1]
        cache = BudgetedCache(self._plan, self._max_tokens)
        self._num_processed = length
        if not cache.eviction.query_sample.uses_repetition:
            return cache, _forward(loaded, self._ids, cache, **_padding(mask, 0, length))
        if mask is not None and not bool(mask.all()):
            raise UserError(
                f"{self._plan.eviction.method} repeats the prompt, which needs rows without padding; prefill one row "
                "at a time"
            )
        prompt = prefill_and_record(loaded, self._ids, (cache.eviction,))
        return compress(loaded, prompt, self._plan, self._max_tokens)

    @override
    @property
    def nbytes(self) -> int:
        return 0


class ChunkedPrefill(PrefillTask):
    """Tokens for a cache, new or not, in forwards of a fixed size, on which the entries that stay depend.

    Each step processes a chunk, whatever it is asked for.

    Args:
        loaded: The model.
        cache: The cache to continue, which changes.
        logits: Those of the next token; they are the result if there are no `ids`.
        ids: The tokens to process, in rows if there are several sequences.
        chunk_tokens: Tokens per forward.
        attention_mask: As in `prefill`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache: BudgetedCache,
        logits: Logits | None,
        ids: Ids | Sequence[int],
        chunk_tokens: int = CONTINUATION_CHUNK_TOKENS,
        attention_mask: Ids | None = None,
    ) -> None:
        self._loaded, self._cache, self._logits, self._chunk_tokens = loaded, cache, logits, chunk_tokens
        self._ids = ids if isinstance(ids, Tensor) else loaded.as_batch(ids)
        self._attention_mask = attention_mask

    @override
    def next_chunk(self, tokens: int) -> TokenChunk | None:
        chunk = self._next() if self._attention_mask is None and len(self._ids) == 1 else None
        return chunk and TokenChunk(self._cache, self._ids[0, chunk])

    @override
    def process(self, logits: Logits) -> PrefillResult | None:
        self._logits = logits
        self._num_processed = min(self._num_processed + self._chunk_tokens, self._ids.shape[1])
        return self._result()

    @override
    @torch.inference_mode()
    def step(self, tokens: int) -> PrefillResult | None:
        if not (chunk := self._next()):
            return self._result()
        padding = _padding(self._attention_mask, chunk.start, chunk.stop)
        return self.process(_forward(self._loaded, self._ids[:, chunk], self._cache, **padding))

    def copy_cache(self) -> BudgetedCache:
        """Return a copy of the cache that has no room for more tokens than it has seen."""
        return self._cache.copy(self._cache.get_seq_length())

    def _next(self) -> slice | None:
        start, total = self._num_processed, self._ids.shape[1]
        return slice(start, min(start + self._chunk_tokens, total)) if start < total else None

    def _result(self) -> PrefillResult | None:
        if self._num_processed < self._ids.shape[1]:
            return None
        if self._logits is None:
            raise UserError("there are no tokens to continue with; give at least one")
        return self._cache, self._logits


class DensePrefill(PrefillTask):
    """A prompt whose full cache grows step by step and is then compressed layer by layer.

    A step that allows for all of it is one forward, in which each layer is compressed as soon as it has attended, so
    that the full cache of one layer is all that is ever allocated.
    """

    def __init__(self, loaded: LoadedModel, plan: BudgetPlan, ids: Ids, max_tokens: int | None) -> None:
        self._loaded, self._ids = loaded, ids
        self._cache = BudgetedCache(plan, max_tokens)
        self._full = RecordingCache(loaded.geometry, (self._cache.eviction,), ids.shape[1])
        self._num_forwarded = self._num_compressed = self._allowance = 0
        self._fits = False  # whether the step under way is all of it
        self._logits: Logits | None = None

    @override
    def next_chunk(self, tokens: int) -> TokenChunk | None:
        taken = self._take(tokens) if len(self._ids) == 1 else None
        return taken and TokenChunk(taken[0], self._ids[0, taken[1]])

    @override
    def process(self, logits: Logits) -> PrefillResult | None:
        self._logits = logits
        if self._fits:
            self._num_forwarded, self._num_compressed = self._ids.shape[1], len(self._full.layers)
            return self._cache, logits
        before, length = self._num_forwarded, self._ids.shape[1]
        self._num_forwarded = min(before + self._allowance, length)
        self._allowance -= self._num_forwarded - before
        return self._compress() if self._num_forwarded == length else None

    @override
    @torch.inference_mode()
    def step(self, tokens: int) -> PrefillResult | None:
        if not (taken := self._take(tokens)):
            return self._compress()
        cache, chunk = taken
        return self.process(_forward(self._loaded, self._ids[:, chunk], cache))

    def _take(self, tokens: int) -> tuple[BudgetedCache | RecordingCache, slice] | None:
        """Return what this step processes in a forward, and the cache for it; None if all has been."""
        length, start = self._ids.shape[1], self._num_forwarded
        self._allowance = max(1, tokens)
        self._fits = not start and tokens >= length + len(self._full.layers) * COMPRESS_LAYER_COST_TOKENS
        if self._fits:
            return self._cache, slice(0, length)
        return (self._full, slice(start, start + self._allowance)) if start < length else None

    def _compress(self) -> PrefillResult | None:
        """Compress as many layers as the rest of a step allows for, at least one."""
        assert self._logits is not None
        self._compress_layers(max(1, self._allowance // COMPRESS_LAYER_COST_TOKENS))
        done = self._num_compressed == len(self._full.layers)
        return (self._cache, self._logits) if done else None

    def _compress_layers(self, count: int) -> None:
        eviction, layers = self._cache.eviction, self._cache.layers
        for index in range(self._num_compressed, min(self._num_compressed + count, len(layers))):
            full = self._full.layers[index]
            # Each is released, so that the peak is the prompt and one layer of the plan.
            if isinstance(full, RecordingLayer):
                full.observe_references()
                scores, references = full.scores.get(eviction.score_key), full.references.get(eviction.reference_key)
                layers[index].load_prompt(full.keys, full.values, scores, references, full.rotary_shift)
                full.release()
            elif isinstance(full, SlidingLayer):
                layers[index].load(full.snapshot())
                full.release()
            if (state := self._full.states.get(index)) is not None:
                self._cache.states[index].load(state.snapshot())
                state.release()
            self._num_compressed += 1

    @override
    @property
    def num_processed(self) -> int:
        return self._num_forwarded + self._num_compressed * COMPRESS_LAYER_COST_TOKENS

    @override
    @property
    def nbytes(self) -> int:
        return self._cache.nbytes + self._full.nbytes
