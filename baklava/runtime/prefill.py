"""How a prompt enters a budgeted cache: whole, chunk by chunk, or whole and then repeated; and once for many plans."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache
from typing_extensions import override

from baklava.cache import attention
from baklava.cache.attention import (
    QUERY_BLOCK_SIZE,
    AttentionParams,
    BudgetedLayerBase,
    GroupedQueries,
    KVStates,
    QueryStates,
    attend_values,
    attention_probs,
    merge_gqa_groups,
    split_gqa_groups,
    visibility_mask,
)
from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.head_groups import AttentionInputs, ScoreAccumulator, first_sampled_query, update_scores
from baklava.cache.recording_layer import Recording, RecordingCache
from baklava.errors import UserError
from baklava.eviction import Eviction, Sample, eviction_of
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.context_reconstruction import add_reconstruction_scores
from baklava.runtime.model_loader import LoadedModel

Ids = Int[Tensor, "batch tokens"]
Logits = Float[Tensor, "batch vocabulary"]


@dataclass(frozen=True)
class PrefilledPrompt:
    """A prompt that the full cache has attended to once, for any number of plans: no plan changes its `logits`."""

    ids: Ids
    recording: Recording
    logits: Logits


@torch.inference_mode()
def prefill_and_record(loaded: LoadedModel, ids: Ids, evictions: Sequence[Eviction]) -> PrefilledPrompt:
    """Prefill a prompt with the full cache, and score it for these eviction methods.

    Raises:
        UserError: the model has sliding layers, or the prompt leaves no room to repeat it where a method must.
    """
    cache = RecordingCache(loaded.geometry, evictions)
    logits = loaded.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    recording = cache.to_recording(ids.shape[1])
    if any(eviction.sample.repeated for eviction in evictions):
        recording = add_reconstruction_scores(loaded, ids, recording)
    return PrefilledPrompt(ids, recording, logits)


@torch.inference_mode()
def compress(
    loaded: LoadedModel, recorded: PrefilledPrompt, plan: BudgetPlan, max_tokens: int | None = None
) -> tuple[BudgetedCache, Logits]:
    """What `prefill` gives, from a recorded prompt: a copy of its cache, cut to the plan.

    Raises:
        UserError: the plan is for another model, or its eviction method was not recorded.
    """
    plan.check_fits(loaded.identity, loaded.geometry)
    if plan.prefill.mode == "dense":
        return BudgetedCache.from_recording(plan, recorded.recording, max_tokens), recorded.logits
    # What a chunk's tokens are depends on what was kept of the chunks before, so such a plan prefills for itself.
    return prefill(loaded, plan, recorded.ids, max_tokens=max_tokens)


@torch.inference_mode()
def prefill(
    loaded: LoadedModel,
    plan: BudgetPlan,
    ids: Ids,
    attention_mask: Ids | None = None,
    max_tokens: int | None = None,
) -> tuple[BudgetedCache, Logits]:
    """A cache that holds a prompt as its plan says, and the logits of the token behind it.

    `room` is the most tokens that any row will have in the end, as in `BudgetedCache`.
    A plain forward does as well, and takes any plan but those that score by context reconstruction; chunk by chunk here
    also bounds what the rest of the model holds.

    Raises:
        UserError: the plan is for another model, the prompt is empty, or the plan's method cannot repeat it.
    """
    plan.check_fits(loaded.identity, loaded.geometry)
    if ids.shape[1] == 0:
        raise UserError("a prompt of 0 tokens leaves nothing to go on from; give at least one token")
    cache = BudgetedCache(plan, max_tokens)
    if cache.eviction.sample.repeated:
        return _reconstructed(loaded, plan, ids, attention_mask, max_tokens)
    size = plan.prefill.chunk or ids.shape[1]
    for start in range(0, ids.shape[1], size):
        stop = min(start + size, ids.shape[1])
        padding = {} if attention_mask is None else _padding(attention_mask, start, stop)
        output = loaded.model(ids[:, start:stop], **padding, past_key_values=cache, logits_to_keep=1)
    return cache, output.logits[:, -1]


def _padding(attention_mask: Ids, start: int, stop: int) -> dict[str, Tensor]:
    """What a forward of these columns is told of padding: positions count a row's real tokens, as generate() does."""
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"attention_mask": attention_mask[:, :stop], "position_ids": positions[:, start:stop]}


def _reconstructed(
    loaded: LoadedModel, plan: BudgetPlan, ids: Ids, attention_mask: Ids | None, room: int | None
) -> tuple[BudgetedCache, Logits]:
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UserError(
            f"{plan.eviction.method} repeats the prompt, which needs rows without padding; prefill one row at a time"
        )
    return compress(loaded, prefill_and_record(loaded, ids, (eviction_of(plan.eviction),)), plan, room)


CONTINUATION_CHUNK_TOKENS = 64
"""Tokens per forward of a text that goes on from a cut cache. What is kept of it depends on this number."""

COMPRESS_LAYER_COST_TOKENS = 16
"""Tokens in whose place a step cuts a layer to the plan, which takes about as long."""

SCORE_BYTES = 4

PrefillResult = tuple[BudgetedCache, Logits]


class PrefillTask(ABC):
    """Takes a step at a time until it gives a cache with all of the text in it, and the logits behind its end."""

    @abstractmethod
    def step(self, tokens: int) -> PrefillResult | None:
        """Take about so many tokens more in; raises UserError where the text cannot enter."""

    @property
    @abstractmethod
    def num_processed(self) -> int:
        """Tokens taken in so far; what takes as long as so many more is counted like them."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held between two steps."""


def make_prefill_task(loaded: LoadedModel, plan: BudgetPlan, ids: Sequence[int], max_tokens: int | None = None) -> PrefillTask:
    """A prompt that enters as its plan says, to what `prefill` gives up to rounding.

    A dense plan's prompt enters in steps of any size; until the last, all of its keys and values are held. A chunked
    plan's enters a chunk a step. Methods that repeat the prompt, and models with sliding layers, take it in one step.

    Raises:
        UserError: the plan is for another model, or the prompt is empty.
    """
    plan.check_fits(loaded.identity, loaded.geometry)
    if not ids:
        raise UserError("a prompt of 0 tokens leaves nothing to go on from; give at least one token")
    if plan.prefill.chunk is not None:
        return ContinuationPrefill(loaded, BudgetedCache(plan, max_tokens), None, ids, plan.prefill.chunk)
    return _Dense(loaded, plan, ids, max_tokens) if _in_steps(plan) else _AtOnce(loaded, plan, ids, max_tokens)


def prefill_workspace_bytes(plan: BudgetPlan, tokens: int, itemsize: int) -> int:
    """Most bytes that a prompt holds beside its cache while it enters; a model's numbers have `itemsize` bytes.

    Of a prompt that enters in one step these are what lives until its end, if it is repeated.
    """
    geometry, sample = plan.geometry, eviction_of(plan.eviction).sample
    if plan.prefill.chunk is not None or not (_in_steps(plan) or sample.repeated):
        return 0
    per_entry = 2 * geometry.head_dim * itemsize + (SCORE_BYTES if plan.eviction.scored else 0)
    queries = min(tokens, sample.window or 0) if sample.whole else 0
    per_layer = tokens * geometry.kv_heads * per_entry + queries * geometry.query_heads * geometry.head_dim * itemsize
    return geometry.layers * per_layer


def _in_steps(plan: BudgetPlan) -> bool:
    return not eviction_of(plan.eviction).sample.repeated and len(plan.geometry.budgetable) == plan.geometry.layers


class _AtOnce(PrefillTask):
    def __init__(self, loaded: LoadedModel, plan: BudgetPlan, ids: Sequence[int], room: int | None) -> None:
        self._take = lambda: prefill(loaded, plan, torch.tensor([list(ids)], device=loaded.device), max_tokens=room)
        self._tokens, self._taken = len(ids), 0

    @override
    def step(self, tokens: int) -> PrefillResult:
        self._taken = self._tokens
        return self._take()

    @override
    @property
    def num_processed(self) -> int:
        return self._taken

    @override
    @property
    def nbytes(self) -> int:
        return 0


class ContinuationPrefill(PrefillTask):
    """More tokens for a cache, a fixed number per forward; with none, the logits that it came with.

    A step that may take fewer is one of several that wait for the next forward.
    """

    def __init__(
        self, loaded: LoadedModel, cache: BudgetedCache, logits: Logits | None, ids: Sequence[int], size: int = CONTINUATION_CHUNK_TOKENS
    ) -> None:
        self._loaded, self._cache, self._logits, self._ids, self._size = loaded, cache, logits, tuple(ids), size
        self._fed = self._allowed = 0

    @override
    @torch.inference_mode()
    def step(self, tokens: int) -> PrefillResult | None:
        part = self._ids[self._fed : self._fed + self._size]
        self._allowed += tokens
        if self._allowed < len(part):
            return None
        if part:
            self._allowed = 0
            fed = torch.tensor([part], device=self._loaded.device)
            output = self._loaded.model(fed, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._logits, self._fed = output.logits[:, -1], self._fed + len(part)
        if self._fed < len(self._ids):
            return None
        if self._logits is None:
            raise UserError("no tokens to go on with; give at least one")
        return self._cache, self._logits

    @override
    @property
    def num_processed(self) -> int:
        return self._fed

    @override
    @property
    def nbytes(self) -> int:
        return self._cache.nbytes


class _Dense(PrefillTask):
    """The prompt's full cache grows step by step, scored as it does; the last steps cut its layers to the plan."""

    def __init__(self, loaded: LoadedModel, plan: BudgetPlan, ids: Sequence[int], room: int | None) -> None:
        self._loaded, self._plan, self._ids, self._room = loaded, plan, tuple(ids), room
        attention.register()
        eviction = eviction_of(plan.eviction)
        self._layers = [_Layer(eviction, len(ids)) for _ in range(loaded.geometry.layers)]
        self._full, self._fed = Cache(layers=list(self._layers)), 0
        self._cache, self._cut = BudgetedCache(plan, room), 0
        self._logits: Logits | None = None

    @override
    @torch.inference_mode()
    def step(self, tokens: int) -> PrefillResult | None:
        part = self._ids[self._fed : self._fed + max(1, tokens)]
        if part:
            fed = torch.tensor([part], device=self._loaded.device)
            output = self._loaded.model(fed, past_key_values=self._full, use_cache=True, logits_to_keep=1)
            self._logits, self._fed = output.logits[:, -1], self._fed + len(part)
        if self._fed < len(self._ids) or self._logits is None:
            return None
        self._cut_layers(max(1, (tokens - len(part)) // COMPRESS_LAYER_COST_TOKENS))
        return (self._cache, self._logits) if self._cut == len(self._layers) else None

    def _cut_layers(self, most: int) -> None:
        budgeted = self._cache.budgeted_layers
        for index in range(self._cut, min(self._cut + most, len(self._layers))):
            layer = self._layers[index]
            budgeted[index].load_prompt(layer.keys, layer.values, layer.scores)
            layer.free()  # so that the peak is the prompt, and one layer of the plan
            self._cut = index + 1

    @override
    @property
    def num_processed(self) -> int:
        return self._fed + self._cut * COMPRESS_LAYER_COST_TOKENS

    @override
    @property
    def nbytes(self) -> int:
        return self._cache.nbytes + sum(layer.nbytes for layer in self._layers)


class _Layer(BudgetedLayerBase):
    """A layer with room for a whole prompt, whose entries are scored while its queries come by."""

    def __init__(self, eviction: Eviction, tokens: int) -> None:
        super().__init__()
        self.eviction, self.tokens = eviction, tokens
        self.scores: Tensor | None = None
        self.queries: list[GroupedQueries] = []

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (*key_states.shape[:2], self.tokens, key_states.shape[3])
        self.keys, self.values = key_states.new_empty(shape), value_states.new_empty(shape)
        if self.eviction.scored:
            self.scores = torch.zeros(shape[:3], device=key_states.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new keys in, and hand them on, tagged with this layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        here = slice(self.cumulative_length, self.cumulative_length + key_states.shape[2])
        self.keys[:, :, here], self.values[:, :, here] = key_states, value_states
        return attention.attach_layer(key_states, self), value_states

    def attend(self, query: QueryStates, key: KVStates, value: KVStates, padding: Tensor | None, kernel: AttentionParams) -> QueryStates:
        """Attend to the prompt so far, and score it."""
        first, self.cumulative_length = self.cumulative_length, self.cumulative_length + key.shape[2]
        queries = split_gqa_groups(query, query.shape[1] // key.shape[1])
        if self.scores is not None and self.eviction.sample == Sample():
            return merge_gqa_groups(self._attend_and_score(queries, first, kernel))
        output = self._forward(queries, kernel).attend(masked=first > 0)
        if self.scores is not None:
            self._observe(queries, first, kernel)
        return merge_gqa_groups(output)

    def _attend_and_score(self, queries: GroupedQueries, first: int, kernel: AttentionParams) -> GroupedQueries:
        """Where every query is observed, its probabilities give the output as well, and are computed once."""
        assert self.scores is not None
        outputs, keeper = [], ScoreAccumulator(self.eviction, self.scores)
        for start in range(0, queries.shape[3], QUERY_BLOCK_SIZE):
            part = queries[:, :, :, start : start + QUERY_BLOCK_SIZE]
            forward = self._forward(part, kernel, first + start + part.shape[3])
            own = forward.query_positions
            attention = attention_probs(part, forward.key, visibility_mask(own, own[:, None]), kernel)
            outputs.append(attend_values(attention, forward.value))
            keeper.update(forward.observation(slice(0, part.shape[3]), forward.key.shape[2], attention))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 3)

    def _forward(self, queries: GroupedQueries, kernel: AttentionParams, reach: int | None = None) -> AttentionInputs:
        """These queries, of which the last is the last of the first `reach` tokens, by default of all so far."""
        tokens = reach or self.cumulative_length
        held = slice(0, tokens)
        positions = torch.arange(tokens, device=queries.device)[None]
        own = positions[:, tokens - queries.shape[3] :]
        return AttentionInputs(queries, self.keys[:, :, held], self.values[:, :, held], own, positions[:, None], kernel)

    def _observe(self, queries: GroupedQueries, first: int, kernel: AttentionParams) -> None:
        assert self.scores is not None
        sample, keepers = self.eviction.sample, [ScoreAccumulator(self.eviction, self.scores)]
        if not sample.whole:
            update_scores(self._forward(queries, kernel), sample, keepers, first, self.tokens)
            return
        # What is to be seen in one block is kept until its last query has come.
        wanted = first_sampled_query(self.tokens, sample) - first
        if wanted < queries.shape[3]:
            self.queries.append(queries[:, :, :, max(0, wanted) :].clone())
        if self.cumulative_length == self.tokens:
            update_scores(self._forward(torch.cat(self.queries, 3), kernel), sample, keepers)
            self.queries.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = (self.keys, self.values, self.scores, *self.queries) if self.is_initialized else ()
        return sum(each.untyped_storage().nbytes() for each in held if each is not None)

    def free(self) -> None:
        """Hold nothing any more."""
        self.keys = self.values = self.scores = None  # type: ignore[assignment]
        self.queries.clear()
