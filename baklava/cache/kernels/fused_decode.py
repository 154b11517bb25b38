"""One new token of many sequences, or many of one, through one layer in one call of a compiled kernel.

numba compiles it for CPUs, in float32 (`numba_decode`), and Triton for GPUs (`triton_decode`).

Entries stay where they are: the kernel gets the table of each layer, with their addresses. So sequences of any length
and plan decode together, and nothing is copied when they start or end. What a kernel does not do, `HeadGroup.attend`
does.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baklava.cache import table_columns as columns
from baklava.cache.attention import QUERY_BLOCK_SIZE, AttentionParams, GroupedQueries
from baklava.cache.head_groups import HeadGroup, LayerTable, NewTokens, ScoredHeadGroup
from baklava.cache.kernels import triton_decode
from baklava.cache.kernels.compiled_entries import CHANNEL_MULTIPLE
from baklava.cache.kernels.numba_runtime import compiling, kernel, run_on_threads
from baklava.cache.storage import stored_dtype
from baklava.plan.geometry import FULL_BITS

MIN_THREAD_SLOTS = 4096
"""Slots of the rows that a thread gets at least; fewer take no longer than to wake it."""

States = tuple[Tensor, Tensor, Tensor]
"""Queries [rows, heads, group, tokens, head_dim], keys and values [rows, heads, tokens, head_dim] of new tokens."""

CHECK_TABLES = False
"""Whether every address is computed at every step, and compared with the table. Tests set it."""


def can_fuse(groups: Sequence[HeadGroup], states: Tensor) -> bool:
    """Return whether a kernel can decode the next tokens of the groups of a layer, which have the keys `states`."""
    if torch.is_grad_enabled() or states.shape[3] % CHANNEL_MULTIPLE:
        return False
    eviction = groups[0].eviction
    # Expected attention scores a token by its query and all keys.
    if not groups[0].num_filled or (eviction.scored and eviction.query_sample.single_block):
        return False
    if any(group.is_dequantized for group in groups):
        return False
    return _uses_numba(states) or (states.shape[2] == 1 and _uses_triton(states))


def _uses_numba(states: Tensor) -> bool:
    return states.device.type == "cpu" and states.dtype == torch.float32 and kernel() is not None


def _uses_triton(states: Tensor) -> bool:
    return states.shape[3] <= triton_decode.MAX_HEAD_DIM and triton_decode.is_available(states.device)


@functools.cache
def prepare(head_dim: int, query_group: int) -> None:
    """Compile the kernel for heads of this dimension and number of queries, unless numba has it on disk.

    The first decode step does it if nobody has. It takes half a minute, and says so if it is not from disk.
    """
    module = None if head_dim % CHANNEL_MULTIPLE else kernel()
    if module is None:
        return
    with compiling():
        module.decode_layer(*_no_rows(head_dim, query_group))
        module.evict_layer(np.empty(0, np.int64), _lengths(head_dim))


def fused_steps(table: LayerTable, states: States, position: int, params: AttentionParams) -> GroupedQueries:
    """Do what `fused_step` does for one cache, with as many tokens as there are."""
    query, key, value = states
    outputs, start, num_tokens = [], 0, key.shape[2]
    while start < num_tokens:
        stop = min(start + _tokens_per_step(table), num_tokens)
        part = query[:, :, :, start:stop], key[:, :, start:stop], value[:, :, start:stop]
        outputs.append(fused_step([table], part, [position + start], params))
        start = stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 3)


def _tokens_per_step(table: LayerTable) -> int:
    """Return how many tokens a kernel may get before PyTorch has to update scores, or to evict."""
    groups = table.pytorch_groups
    limit = QUERY_BLOCK_SIZE if any(group.score_update == columns.KEEP_PROBS for group in groups) else sys.maxsize
    return min([limit, *(group.tokens_until_eviction for group in groups)])


def fused_step(
    tables: Sequence[LayerTable], states: States, positions: Sequence[int], params: AttentionParams
) -> GroupedQueries:
    """Do what `HeadGroup.attend` does with new tokens of each row one by one, for all KV heads of a layer.

    There is one token, or there are several of which none but the last is followed by an eviction in PyTorch.

    Args:
        tables: The table of this layer of each cache. A cache has one row or more.
        states: Queries, keys and values of all rows.
        positions: Position of the first new token of each cache.
        params: What the model's attention has in addition.
    """
    rows, heads = states[1].shape[:2]
    counts = [len(table.rows) for table in tables]
    if sum(counts) != rows or any(table.rows.shape[1] != heads for table in tables):
        raise RuntimeError(f"{rows} rows of {heads} KV heads for caches of {sum(counts)} rows")
    if CHECK_TABLES:
        for table in tables:
            table.check()
    run = _run_numba if _uses_numba(states[1]) else _run_triton
    if run is _run_triton and len({table.scoring for table in tables}) > 1:
        parts = zip(tables, zip(*(part.split(counts) for part in states), strict=True), positions, strict=True)
        return torch.cat([fused_step([table], own, [position], params) for table, own, position in parts])
    output, rotated, probs = run(tables, np.repeat(positions, counts), states, params)
    first = 0
    for table, count, position in zip(tables, counts, positions, strict=True):
        groups = table.pytorch_groups if run is _run_numba else table.scored_groups
        if groups:
            here = slice(first, first + count)
            own = [part[here] for part in rotated], None if probs is None else probs[here]
            _update_scores_and_evict(table, groups, own, position, params, evict_here=run is _run_numba)
        first += count
    return output


def _run_numba(
    tables: Sequence[LayerTable], positions: np.ndarray, states: States, params: AttentionParams
) -> tuple[Tensor, States, Tensor | None]:
    """Return the output, the states as they are rotated, and the probabilities if some scores need them."""
    rows, heads, group_size, num_tokens, head_dim = states[0].shape
    # Copies, since the kernel rotates them. Under autocast values have 16 bits.
    query, key, value = (part.float().numpy().copy() for part in (states[0].transpose(2, 3), *states[1:]))
    sinks = np.empty((0, 0), np.float32)
    if params.sink_logits is not None:
        sinks = np.tile(params.sink_logits.float().view(heads, group_size).numpy(), (rows, 1))
    longest = _longest_probs(tables, num_tokens)
    probs = np.empty((rows * heads, num_tokens, group_size, longest) if longest else (0, 0, 0, 0), np.float32)
    inputs = KernelInputs(
        addresses=np.concatenate([table.addresses for table in tables]),
        positions=np.repeat(positions, heads),
        query=query.reshape(rows * heads, num_tokens, group_size, head_dim),
        key=key.reshape(rows * heads, num_tokens, head_dim),
        value=value.reshape(rows * heads, num_tokens, head_dim),
        output=np.empty((rows * heads, num_tokens, group_size, head_dim), np.float32),
        sinks=sinks,
        probs=probs,
    )
    prepare(head_dim, group_size)
    module, options = kernel(), _options(params, head_dim, group_size)
    slots = np.concatenate([table.slots for table in tables])

    def decode(part: slice, tables: Sequence[LayerTable] = tables) -> int:  # a thread keeps what it writes to alive
        refused: int = module.decode_layer(*inputs.narrow(part), *options)
        return refused

    refused = run_on_threads(decode, slots * num_tokens, MIN_THREAD_SLOTS)
    _check_all_done(refused, tables)
    rotated = torch.from_numpy(query).transpose(2, 3), torch.from_numpy(key), torch.from_numpy(value)
    observed = torch.from_numpy(probs).unflatten(0, (rows, heads)).transpose(2, 3) if probs.size else None
    return torch.from_numpy(inputs.output).unflatten(0, (rows, heads)).transpose(2, 3), rotated, observed


def _check_all_done(refused: int, tables: Sequence[LayerTable]) -> None:
    if refused:
        filled = [int(table.rows[..., columns.FILLED].max()) for table in tables]
        raise RuntimeError(f"{refused} rows have no slot for a token after {filled}: drop the cache after an error")


def _longest_probs(tables: Sequence[LayerTable], num_tokens: int) -> int:
    """Return the largest number of entries whose probabilities are kept; 0 if none are."""
    groups = (group for table in tables for group in table.pytorch_groups)
    keeping = (group for group in groups if group.score_update == columns.KEEP_PROBS)
    return max((group.num_filled + num_tokens for group in keeping), default=0)


def _run_triton(
    tables: Sequence[LayerTable], positions: np.ndarray, states: States, params: AttentionParams
) -> tuple[Tensor, States, Tensor | None]:
    """Do what `_run_numba` does on another device, with one token, and leave evictions to PyTorch.

    All scored entries are of one method.
    """
    query, key, value = states[0][:, :, :, 0], states[1][:, :, 0], states[2][:, :, 0]
    device, shape = query.device, query.shape[:2]
    rows, heads, group_size, head_dim = query.shape
    table = np.concatenate([each.rows for each in tables]).reshape(rows * heads, columns.NUM_COLUMNS)
    positions = np.repeat(positions, heads)
    filled, ring, sink_tokens = table[:, columns.FILLED], table[:, columns.RING_LENGTH], table[:, columns.SINK_TOKENS]
    around = sink_tokens + (positions - sink_tokens) % np.maximum(ring, 1)
    slots = np.where(ring > 0, np.where(positions < sink_tokens, positions, around), filled)
    counts = np.where(ring > 0, np.minimum(filled + 1, table[:, columns.CAPACITY]), filled + 1)
    _check_all_done(int(((slots >= counts) | (counts > table[:, columns.SLOTS])).sum()), tables)
    update, hitter = int(table[:, columns.UPDATE].max()), table[table[:, columns.UPDATE].argmax()]
    longest = int(counts.max())
    on_device = {"tables": table, "slots": slots, "counts": counts, "positions": positions}
    sinks = torch.empty(0, 0, device=device)
    if params.sink_logits is not None:
        sinks = params.sink_logits.float().view(heads, group_size).repeat(rows, 1)
    size = (rows * heads, group_size, longest) if update == columns.KEEP_PROBS else (0, 0, 0)
    probs = torch.empty(size, dtype=torch.float32, device=device)
    output = query.new_empty(rows * heads, group_size, head_dim)
    rotated = triton_decode.decode_layer(
        **{name: torch.from_numpy(part).to(device) for name, part in on_device.items()},
        query=query.flatten(0, 1),
        key=key.flatten(0, 1),
        value=value.flatten(0, 1),
        output=output,
        sinks=sinks,
        probs=probs,
        scaling=params.scaling,
        softcap=params.softcap or 0.0,
        update=update,
        distance=int(hitter[columns.DISTANCE]),
        squared=bool(hitter[columns.SQUARED]),
        by_max=bool(hitter[columns.BY_MAX]),
        max_entries=longest,
        dense_dtype=stored_dtype(query.dtype, FULL_BITS),
    ).unflatten(0, shape)
    table[:, columns.FILLED], table[:, columns.LAST_POSITION] = counts, positions
    counted, first = table[:, columns.COUNTERS].reshape(rows, heads, -1), 0
    for each in tables:
        each.rows[..., columns.COUNTERS] = counted[first : first + len(each.rows)]
        first += len(each.rows)
    observed = probs.unflatten(0, shape)[:, :, :, None] if probs.numel() else None
    parts = rotated[:, :, :group_size, None], rotated[:, :, None, group_size], rotated[:, :, None, group_size + 1]
    return output.unflatten(0, shape)[:, :, :, None], parts, observed


@dataclass(frozen=True)
class KernelInputs:
    """The arrays of one call, with a row for each (sequence, KV head), as `numba_decode.decode_layer` takes them."""

    addresses: np.ndarray
    positions: np.ndarray
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    output: np.ndarray
    sinks: np.ndarray
    probs: np.ndarray

    def narrow(self, rows: slice) -> list[np.ndarray]:
        """Return some rows of each array, in order."""
        return [array[rows] for array in vars(self).values()]


def _options(params: AttentionParams, head_dim: int, group_size: int) -> tuple[Any, ...]:
    numbers = np.float32(params.scaling), np.float32(params.softcap or 0)
    return (*numbers, _lengths(head_dim), _lengths(head_dim // 2), _lengths(group_size))


def _lengths(length: int) -> tuple[int, ...]:
    """Return the tuple whose length the kernel takes as a constant."""
    return (0,) * length


def _no_rows(head_dim: int, group_size: int) -> tuple[Any, ...]:
    numbers, none = np.empty(0, np.int64), np.empty((0, 0), np.float32)
    states, queries = np.empty((0, 0, head_dim), np.float32), np.empty((0, 0, group_size, head_dim), np.float32)
    probs = np.empty((0, 0, 0, 0), np.float32)
    inputs = KernelInputs(numbers, numbers, queries, states, states, queries, none, probs)
    return (*inputs.narrow(slice(None)), *_options(AttentionParams(1.0), head_dim, group_size))


def _update_scores_and_evict(
    table: LayerTable,
    groups: Sequence[ScoredHeadGroup],
    observed: tuple[Sequence[Tensor], Tensor | None],
    position: int,
    params: AttentionParams,
    *,
    evict_here: bool,
) -> None:
    """Do what the kernel has left to do after tokens of one cache, the first of which is at this position.

    Args:
        table: The table of the cache.
        groups: The groups for which something is left.
        observed: The states as they are rotated, and the probabilities if they were kept.
        position: Position of the first token.
        params: What the model's attention has in addition.
        evict_here: Whether the kernel can evict, apart from methods with pooling.
    """
    rotated, probs = observed
    num_tokens, due = rotated[1].shape[2], []
    for group in groups:
        _update_scores(group, rotated, probs, position, params)
        if not evict_here or group.eviction.pooling > 1:
            group.maybe_evict(num_tokens)
        elif group.count_tokens(num_tokens):
            due += group.addresses.tolist()
    if due:
        kernel().evict_layer(np.array(due), _lengths(groups[0].head_dim))


def _update_scores(
    group: ScoredHeadGroup, rotated: Sequence[Tensor], probs: Tensor | None, position: int, params: AttentionParams
) -> None:
    """Update the scores that the kernel does not update."""
    num_tokens = rotated[1].shape[2]
    if probs is not None and group.score_update == columns.KEEP_PROBS:
        query, own = rotated[0][:, group.index], probs[:, group.index, ..., : group.num_filled]
        group.observe_attention(query, own, position, params.scaling)
    elif group.eviction.query_sample.window == 0 and group.is_about_to_evict(num_tokens):
        query, key, value = (part[:, group.index] for part in rotated)
        at = torch.arange(position, position + num_tokens, device=query.device)[None]
        tokens = NewTokens(position, query, key, value, at, padded=False, teacher_forced=False)
        group.observe_entries(tokens, params)
