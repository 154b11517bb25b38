"""One forward for the new tokens of many sequences, one or more of each: decode rows and chunks of prompts alike.

The tokens are one row. So embeddings, linear layers and norms read the weights once for all of them, and attention goes
from sequence to sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from baklava.cache.attention import (
    AttentionParams,
    BudgetedLayerBase,
    KVStates,
    QueryStates,
    RingWindow,
    attend,
    merge_gqa_groups,
    split_gqa_groups,
)
from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.budgeted_layer import BudgetedLayer, decode_rows
from baklava.cache.sliding_layer import SlidingLayer
from baklava.cache.state_layer import NoAttentionLayer, StatefulCache, stack_states, unstack_states
from baklava.errors import UserError
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import Logits, TokenChunk, check_progress


@dataclass(frozen=True, eq=False)
class _Batch:
    """The chunks of a forward and where their tokens begin.

    `shared_layers` are those whose keys others read, `after_layer` is called after each attention, and `errors` are by
    chunk.
    """

    chunks: Sequence[TokenChunk]
    starts: Sequence[int]
    shared_layers: Sequence[int]
    after_layer: Callable[[], None] | None = None
    errors: dict[int, Exception] = field(default_factory=dict)


class BatchedLayer(BudgetedLayerBase):
    """The same layer of the caches of several sequences.

    Sequences differ in their lengths, so `get_seq_length` is 0 and the positions must be passed to the model.
    """

    def __init__(self, index: int, batch: _Batch) -> None:
        super().__init__()
        self._index, self._batch = index, batch
        self._windows: dict[int, tuple[KVStates, KVStates]] = {}
        """Entries of a sliding layer by chunk, for the layers that read them again."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Attach this layer to the new keys; every cache stores its own when it attends."""
        return self.attach(key_states), value_states

    def attend(
        self, query: QueryStates, key: KVStates, value: KVStates, padding: Tensor | None, params: AttentionParams
    ) -> QueryStates:
        """Return the output of all new tokens, each over the entries of its own sequence.

        They are one row, or a row each. A layer that shares the keys calls it again, and they are stored once.
        """
        if len(query) > 1:
            one_row = (states.transpose(0, 2) for states in (query, key, value))
            own_query, own_key, own_value = one_row
            return self.attend(own_query, own_key, own_value, padding, params).transpose(0, 2)
        is_new, self.pending_attend = self.pending_attend, False
        output, rows = torch.empty_like(query), []
        for number, chunk in enumerate(self._batch.chunks):
            layer, start = chunk.cache.layers[self._index], self._batch.starts[number]
            own = slice(start, start + len(chunk.ids))
            is_decoded = len(chunk.ids) == 1 and isinstance(layer, BudgetedLayer) and layer.is_initialized
            if is_decoded and is_new:
                rows.append((layer, start))
            else:
                tokens = query[:, :, own], key[:, :, own], value[:, :, own]
                output[:, :, own] = self._attend(number, tokens, params, is_new)
        if rows:
            layers, columns = zip(*rows, strict=True)
            at = torch.tensor(columns, device=query.device)
            states = (each[0].index_select(1, at).transpose(0, 1)[:, :, None] for each in (query, key, value))
            own_query, own_key, own_value = states
            decoded = decode_rows(layers, own_query, own_key, own_value, params)
            output[0].index_copy_(1, at, decoded[:, :, 0].transpose(0, 1))
        if self._batch.after_layer is not None:
            if len(self._batch.errors) == len(self._batch.chunks):
                raise next(iter(self._batch.errors.values()))
            self._batch.after_layer()
        return output

    def _attend(
        self, number: int, tokens: tuple[QueryStates, KVStates, KVStates], params: AttentionParams, is_new: bool
    ) -> QueryStates | float:
        """Return the output of one chunk, or 0 if it fails: the other sequences of the forward go on."""
        if number in self._batch.errors:
            return 0
        cache = self._batch.chunks[number].cache
        try:
            (query, key, value), layer = tokens, cache.layers[self._index]
            if is_new:
                key, value = cache.update(key, value, self._index)
            if isinstance(layer, BudgetedLayerBase):
                return layer.attend(query, key, value, None, params)
            assert isinstance(layer, SlidingLayer)
            if not is_new:
                key, value = self._windows[number]
            elif self._index in self._batch.shared_layers:
                self._windows[number] = key, value
            return _attend_window(layer, query, key, value, params)
        except Exception as error:
            self._batch.errors[number] = error
            return 0


def _attend_window(
    layer: SlidingLayer, query: QueryStates, key: KVStates, value: KVStates, params: AttentionParams
) -> QueryStates:
    """Return the output over the entries of a sliding layer, of which the last are the queries' own."""
    entries, queries = key.shape[2], query.shape[2]
    positions = torch.arange(entries, device=key.device)[None]
    grouped, own = split_gqa_groups(query, query.shape[1] // key.shape[1]), positions[:, entries - queries :]
    # One new token attends to all that is left: the layer has cut its entries to the window already.
    window = RingWindow(0, layer.sliding_window) if queries > 1 else None
    output = attend(grouped, key, value, own, positions[:, None], params, masked=queries > 1, window=window)
    return merge_gqa_groups(output)


class BatchedCache(StatefulCache):
    """The caches of several sequences, for one forward.

    Nothing here refers to itself, so a cache is freed as soon as its sequence ends.
    """

    def __init__(self, batch: _Batch) -> None:
        caches = [chunk.cache for chunk in batch.chunks]
        layers = [
            NoAttentionLayer() if isinstance(layer, NoAttentionLayer) else BatchedLayer(index, batch)
            for index, layer in enumerate(caches[0].layers)
        ]
        states = caches[0].states
        if len(caches) > 1:
            states = {index: stack_states([cache.states[index] for cache in caches]) for index in states}
        super().__init__(layers, states)


@torch.inference_mode()
def batched_forward(loaded: LoadedModel, chunks: Sequence[TokenChunk]) -> tuple[Logits, dict[int, Exception]]:
    """Process the new tokens of all chunks in one forward.

    The caches may differ in plan and length. No chunk depends on the others, beyond rounding. After an error a cache is
    in an undefined state and must be dropped.

    Returns:
        The logits after the last token of each chunk, and the exceptions of the chunks whose attention failed by
        itself, by their place. Decode rows attend together in layers with a budget, so an exception there is raised,
        or given to all of them if others have forwards of their own that do not fail.
    """
    run = forward_one_row if len(chunks) == 1 or not loaded.geometry.states else _forward_apart
    return run(loaded, chunks)


def forward_one_row(
    loaded: LoadedModel, chunks: Sequence[TokenChunk], after_layer: Callable[[], None] | None = None
) -> tuple[Logits, dict[int, Exception]]:
    """Do what `batched_forward` does, in the caller's inference mode, and call something after each layer's attention.

    The tokens of all chunks are one row, so a model with states takes one chunk. The call may pause the forward, as
    long as nothing else uses these caches meanwhile. With such a call, the exception is raised as soon as all chunks
    have failed.
    """
    device = loaded.device
    counts, lengths = [len(chunk.ids) for chunk in chunks], [chunk.cache.get_seq_length() for chunk in chunks]
    ends = torch.tensor(counts).cumsum(0)
    starts = (ends - torch.tensor(counts)).tolist()
    batch = _Batch(chunks, starts, loaded.geometry.shared_layers, after_layer)
    positions = [torch.arange(length, length + count) for length, count in zip(lengths, counts, strict=True)]
    output = loaded.model(
        input_ids=torch.cat([chunk.ids for chunk in chunks])[None],
        position_ids=torch.cat(positions).to(device)[None],
        past_key_values=BatchedCache(batch),
        use_cache=True,
        logits_to_keep=(ends - 1).to(device),
    )
    for number, chunk in enumerate(chunks):
        if number not in batch.errors:
            check_progress(chunk.cache, lengths[number] + counts[number])
    return output.logits[0], batch.errors


def _forward_apart(loaded: LoadedModel, chunks: Sequence[TokenChunk]) -> tuple[Logits, dict[int, Exception]]:
    """Process single tokens as the rows of one forward, and longer chunks in forwards of their own.

    States run along a row, so that a row can have only one sequence.
    """
    decoding = [number for number, chunk in enumerate(chunks) if len(chunk.ids) == 1 and chunk.cache.get_seq_length()]
    alone = sorted(set(range(len(chunks))) - set(decoding))
    logits: dict[int, Tensor] = {}
    errors: dict[int, Exception] = {}
    for numbers, forward in [(decoding, _forward_rows), *(([number], forward_one_row) for number in alone)]:
        if not numbers:
            continue
        try:
            own_logits, own_errors = forward(loaded, [chunks[number] for number in numbers])
        except Exception as error:
            errors |= dict.fromkeys(numbers, error)
        else:
            logits |= dict(zip(numbers, own_logits, strict=True))
            errors |= {numbers[place]: error for place, error in own_errors.items()}
    if not logits:
        raise next(iter(errors.values()))
    failed = torch.zeros_like(next(iter(logits.values())))
    return torch.stack([logits.get(number, failed) for number in range(len(chunks))]), errors


def _forward_rows(loaded: LoadedModel, chunks: Sequence[TokenChunk]) -> tuple[Logits, dict[int, Exception]]:
    """Process one token of each sequence, which is a row of its own."""
    batch = _Batch(chunks, range(len(chunks)), loaded.geometry.shared_layers)
    lengths = [chunk.cache.get_seq_length() for chunk in chunks]
    stacked = BatchedCache(batch)
    output = loaded.model(
        input_ids=torch.cat([chunk.ids for chunk in chunks])[:, None],
        position_ids=torch.tensor(lengths, device=loaded.device)[:, None],
        past_key_values=stacked,
        use_cache=True,
    )
    if len(chunks) > 1:
        for index, states in stacked.states.items():
            unstack_states(states, [chunk.cache.states[index] for chunk in chunks])
    for row, chunk in enumerate(chunks):
        if row not in batch.errors:
            check_progress(chunk.cache, lengths[row] + 1)
    return output.logits[:, -1], batch.errors


@torch.inference_mode()
def decode_step(loaded: LoadedModel, caches: Sequence[BudgetedCache], tokens: Sequence[int]) -> Logits:
    """Return the logits after one new token of each sequence, one row each. After an error all caches must be dropped.

    Raises:
        UserError: there is no sequence, or not one token for each.
    """
    if not caches or len(caches) != len(tokens):
        raise UserError(f"{len(tokens)} tokens for {len(caches)} caches; give one new token for each of at least one")
    ids = torch.tensor(tokens, device=loaded.device).split(1)
    logits, errors = batched_forward(loaded, [TokenChunk(cache, own) for cache, own in zip(caches, ids, strict=True)])
    for error in errors.values():
        raise error
    return logits
