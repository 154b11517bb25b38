"""The full cache of a prompt, recorded once so that budgeted caches can be made from it by any number of plans."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from typing_extensions import override

from baklava.cache import attention
from baklava.cache.attention import (
    AttentionParams,
    BudgetedLayerBase,
    GroupedQueries,
    KVStates,
    QueryStates,
    merge_gqa_groups,
    split_gqa_groups,
)
from baklava.cache.head_groups import (
    AttentionInputs,
    PromptEntries,
    ReferenceQueries,
    References,
    ReferenceSample,
    ScoreAccumulator,
    first_sampled_query,
    observe_references,
    update_scores,
)
from baklava.cache.rotary_shift import RotaryShift
from baklava.cache.sliding_layer import LayerSnapshot, SlidingLayer
from baklava.cache.state_layer import StatefulCache, new_states, unbudgeted_layer
from baklava.cache.storage import count_bytes
from baklava.eviction import Eviction, QuerySample
from baklava.plan.geometry import CacheGeometry

UNROUNDED_BITS = 32
"""Bits of the entries of sliding layers while a prompt is recorded: those of the model, if it computes in fewer."""


def _counted(tensor: Tensor) -> Tensor:
    """Return a tensor after counting its bytes, which it owns alone."""
    count_bytes(tensor, tensor.untyped_storage().nbytes())
    return tensor


class RecordingLayer(BudgetedLayerBase):
    """A layer that keeps a whole prompt and scores it for eviction methods, in one forward or in several.

    Args:
        prompt_tokens: Length of the prompt; keys, values and scores are allocated for it at the first forward.
        evictions: Methods with different observations, each of which scores the prompt's own queries.
    """

    def __init__(self, prompt_tokens: int, evictions: Sequence[Eviction]) -> None:
        super().__init__()
        self.prompt_tokens, self.evictions = prompt_tokens, tuple(evictions)
        self.scores: dict[Hashable, Tensor] = {}
        self.references: dict[tuple[int, int], References] = {}
        self._pending_queries: dict[QuerySample, list[GroupedQueries]] = {}
        self._reference_queries: dict[int, list[GroupedQueries]] = {}
        self._params: AttentionParams | None = None

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        self.keys = key_states.new_empty(batch, heads, self.prompt_tokens, head_dim)
        self.values = value_states.new_empty(batch, heads, self.prompt_tokens, value_states.shape[3])
        for eviction in self.evictions:
            self.scores[eviction.score_key] = torch.zeros(self.keys.shape[:3], device=key_states.device)
        for tensor in (self.keys, self.values, *self.scores.values()):
            count_bytes(tensor, tensor.nbytes)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new keys and values, and return views of them, with this layer attached to the keys.

        Views, so that the projections are freed before attention.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = slice(self.cumulative_length, self.cumulative_length + key_states.shape[2])
        keys, values = self.keys[:, :, new], self.values[:, :, new]
        keys.copy_(key_states)
        values.copy_(value_states)
        return self.attach(keys), values

    def attend(
        self, query: QueryStates, key: KVStates, value: KVStates, padding: Tensor | None, params: AttentionParams
    ) -> QueryStates:
        """Attend to the prompt so far and update its scores, or let a layer that shares the keys attend to it."""
        queries = split_gqa_groups(query, query.shape[1] // key.shape[1])
        start = self.cumulative_length
        if not self.pending_attend:
            inputs = self._inputs(queries, params, start)
            return merge_gqa_groups(inputs.attend(masked=start > query.shape[2]))
        self.pending_attend = False
        self.cumulative_length += query.shape[2]
        inputs = self._inputs(queries, params, self.cumulative_length)
        accumulators = [each for each in self._accumulators() if not each.sample.single_block]
        output = inputs.attend_and_observe(accumulators, start > 0, start, self.prompt_tokens)
        self._observe_in_one_block(inputs, start)
        self._keep_references(inputs, start)
        return merge_gqa_groups(output)

    def _inputs(self, queries: GroupedQueries, params: AttentionParams, tokens: int) -> AttentionInputs:
        """Return the attention of the last of the first `tokens` tokens, whose queries these are, to all of them."""
        positions = torch.arange(tokens, device=queries.device)[None]
        own = positions[:, tokens - queries.shape[3] :]
        return AttentionInputs(
            queries, self.keys[:, :, :tokens], self.values[:, :, :tokens], own, positions[:, None], params
        )

    def _observe_in_one_block(self, inputs: AttentionInputs, start: int) -> None:
        """Update scores by queries that are observed in one block: they wait for the last of them."""
        accumulators = [each for each in self._accumulators() if each.sample.single_block]
        for sample in dict.fromkeys(each.sample for each in accumulators):
            pending = self._pending_queries.setdefault(sample, [])
            first = max(0, first_sampled_query(self.prompt_tokens, sample) - start)
            if first < inputs.query.shape[3]:
                pending.append(_counted(inputs.query[:, :, :, first:].clone()))
            if self.cumulative_length == self.prompt_tokens:
                block = self._inputs(torch.cat(pending, 3), inputs.params, self.prompt_tokens)
                update_scores(block, sample, [each for each in accumulators if each.sample == sample])
                pending.clear()

    def _keep_references(self, inputs: AttentionInputs, start: int) -> None:
        """Keep the reference queries among these tokens until `observe_references`."""
        self._params = inputs.params
        for count in {each.num_references for each in self.evictions} - {0}:
            tokens = ReferenceSample.spread(count, self.prompt_tokens).tokens
            here = [token - start for token in tokens if start <= token < self.cumulative_length]
            self._reference_queries.setdefault(count, []).append(_counted(inputs.query[:, :, :, here]))

    def observe_references(self) -> None:
        """Find what the whole prompt answers its reference queries, for methods that score or fit by it."""
        while self._reference_queries:
            assert self._params is not None
            count, queries = self._reference_queries.popitem()
            sample = ReferenceSample.spread(count, self.prompt_tokens)
            positions = torch.arange(self.prompt_tokens, device=self.keys.device)[None, None]
            methods = {each.score_key: each for each in self.evictions if each.query_sample.references == count}
            references = observe_references(
                ReferenceQueries.of(torch.cat(queries, 3), (sample,), self.prompt_tokens, self._params),
                PromptEntries(self.keys, self.values, positions),
                self.prompt_tokens,
                self._params,
                [(each, self.scores[key]) for key, each in methods.items()],
            )
            for fitting in (each for each in self.evictions if each.num_references == count and each.fit_references):
                self.references[fitting.reference_key] = references.thinned(fitting.fit_references)
        for tensor in self._reference_tensors:
            _counted(tensor)

    @property
    def _reference_tensors(self) -> list[Tensor]:
        return [tensor for each in self.references.values() for tensor in each.tensors]

    def _accumulators(self) -> list[ScoreAccumulator]:
        """Return the methods, once each, as they observe queries where they stand."""
        methods = {eviction.score_key: eviction for eviction in self.evictions}.values()
        return [
            ScoreAccumulator.of_prompt(eviction, self.scores[eviction.score_key], eviction.query_sample)
            for eviction in methods
        ]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, over the whole batch."""
        if not self.is_initialized:
            return 0
        waiting = (*self._pending_queries.values(), *self._reference_queries.values())
        pending = [queries for block in waiting for queries in block]
        tensors = (self.keys, self.values, *self.scores.values(), *pending, *self._reference_tensors)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)

    @property
    def rotary_shift(self) -> RotaryShift | None:
        """How this layer rotates its keys, if it has seen any and its rotation is known."""
        return None if self._params is None else self._params.rotary_shift

    def release(self) -> None:
        """Free all tensors."""
        self.keys = self.values = None  # type: ignore[assignment]
        self.scores, self.references = {}, {}
        self._pending_queries.clear()
        self._reference_queries.clear()


@dataclass(frozen=True)
class Recording:
    """A prompt's full cache.

    Attributes:
        geometry: shape of the model's cache.
        keys: keys of every layer with full attention.
        values: their values.
        scores: their scores of each recorded observation.
        sliding: the layers with a sliding window by index, which keep it as transformers does.
        states: the states of the layers that have one.
        references: the references of every layer with full attention, for each fit that was recorded.
        reconstruction: the largest attention that the entries of every layer with full attention get while the model
            repeats the prompt, if it did.
        rotary_shifts: how each of these layers rotates its keys, if that is known.
    """

    geometry: CacheGeometry
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    scores: tuple[dict[Any, Tensor], ...]
    sliding: dict[int, LayerSnapshot]
    states: dict[int, LayerSnapshot]
    references: tuple[dict[tuple[int, int], References], ...] = ()
    reconstruction: tuple[Tensor, ...] = ()
    rotary_shifts: tuple[RotaryShift | None, ...] = ()

    def to_dynamic_cache(self) -> Cache:
        """Return transformers' own cache with all of the prompt; updating it does not change the recording."""
        layers = [DynamicLayer() for _ in self.keys]
        for layer, key, value in zip(layers, self.keys, self.values, strict=True):
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
        return self.to_cache(layers)

    def to_cache(self, full_attention_layers: Sequence[CacheLayerMixin]) -> Cache:
        """Return a cache of these layers, and of copies of all that the others hold, in the order of the model."""
        full = iter(full_attention_layers)
        layers = [
            next(full) if window is None else unbudgeted_layer(window, UNROUNDED_BITS)
            for window in self.geometry.windows
        ]
        cache = StatefulCache(layers, new_states(self.geometry))
        self.load_unbudgeted(cache)
        return cache

    def load_unbudgeted(self, cache: StatefulCache) -> None:
        """Let the layers of a cache that have no budget continue from here, with tensors of their own."""
        for index, snapshot in self.sliding.items():
            cache.layers[index].load(snapshot)
        for index, snapshot in self.states.items():
            cache.states[index].load(snapshot)


class RecordingCache(StatefulCache):
    """The full cache of one prompt, from which budgeted caches are made.

    Args:
        geometry: The shape of the model's cache.
        evictions: Methods to score the prompt for; those that score nothing are skipped.
        prompt_tokens: Length of the prompt.
    """

    def __init__(self, geometry: CacheGeometry, evictions: Sequence[Eviction], prompt_tokens: int) -> None:
        attention.register()
        self.geometry = geometry
        recorded = [eviction for eviction in evictions if eviction.scored]
        distinct = list({(eviction.score_key, *eviction.reference_key): eviction for eviction in recorded}.values())
        super().__init__(
            [
                RecordingLayer(prompt_tokens, distinct) if window is None else unbudgeted_layer(window, UNROUNDED_BITS)
                for window in geometry.windows
            ],
            new_states(geometry),
        )

    def to_recording(self) -> Recording:
        """Return the keys, values and scores of the prompt, after all of it has been processed."""
        layers = [layer for layer in self.layers if isinstance(layer, RecordingLayer)]
        for layer in layers:
            layer.observe_references()
        keys, values = (tuple(getattr(layer, name) for layer in layers) for name in ("keys", "values"))
        sliding = {
            index: layer.snapshot() for index, layer in enumerate(self.layers) if isinstance(layer, SlidingLayer)
        }
        states = {index: state.snapshot() for index, state in self.states.items()}
        scores, references = tuple(layer.scores for layer in layers), tuple(layer.references for layer in layers)
        rotary_shifts = tuple(layer.rotary_shift for layer in layers)
        return Recording(self.geometry, keys, values, scores, sliding, states, references, rotary_shifts=rotary_shifts)
