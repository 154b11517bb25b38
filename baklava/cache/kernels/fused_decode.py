"""One new token of many sequences, or many of one, through one layer in one call of a compiled kernel.

numba compiles it for CPUs, in float32 (`numba_decode`), and Triton for GPUs (`triton_decode`).

Entries stay where they are: the kernel gets a table of their addresses. So sequences of any length decode together, and
nothing is copied when they start, grow or end. Whatever the kernel does not do, `HeadGroup.attend` does.
"""

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from baklava.cache.attention import QUERY_BLOCK_SIZE, AttentionParams, GroupedQueries, KVStates
from baklava.cache.head_groups import HeadGroup, NewTokens, ScoredHeadGroup
from baklava.cache.kernels import table_columns as columns
from baklava.cache.kernels import triton_decode
from baklava.cache.storage import (
    DenseCodec,
    MixedPrecisionCodec,
    QuantizedCodec,
    SegmentedStorage,
    SlotStorage,
    Storage,
    stored_dtype,
)
from baklava.cache.storage.segmented_storage import Segment
from baklava.errors import UserError
from baklava.eviction import Eviction, HeavyHitter
from baklava.paths import cache_dir
from baklava.plan.geometry import FULL_BITS

logger = logging.getLogger(__name__)

CHANNEL_MULTIPLE = 32
"""Heads of other dimensions are not for the kernel, since planes of their codes do not fill words of 32 bits."""

MAX_STEP_TOKENS = 512
"""Tokens of a cache that are decoded in one call, if there is no eviction between them."""

EVICTION_WORK = 4
"""How many times as long as attending to an entry it takes to decide whether it is evicted, moves included."""

MIN_THREAD_ENTRIES = 4096
"""Entries that a thread reads at least; fewer take no longer than to wake it."""

NOTICE_SECONDS = 2.0
"""Compilation that takes longer is announced."""

CHECK_TABLES = False
"""Whether every address is computed at every step, and compared with the table. Tests set it."""

Table = np.ndarray


class LayerTable:
    """The table of one layer of one cache: [batch, heads, columns]. It is made again if entries have moved."""

    def __init__(self) -> None:
        self._parts: list[Table] = []
        self._table: Table | None = None

    def of(self, groups: Sequence[HeadGroup]) -> Table:
        """Return the table of these groups, which are those of a layer."""
        parts = [_group_table(group) for group in groups]
        if self._table is None or any(new is not old for new, old in zip(parts, self._parts, strict=True)):
            heads = sum(len(group.budget.heads) for group in groups)
            self._table = np.empty((len(parts[0]), heads, parts[0].shape[2]), np.int64)
            for group, part in zip(groups, parts, strict=True):
                self._table[:, list(group.budget.heads)] = part
            self._parts = parts
        return self._table


@functools.cache
def kernel() -> Any:
    """Return the module of the kernel, or None if numba does not work or the CPU lacks its instructions."""
    if find_spec("numba") is None:
        logger.warning(
            "numba is not installed, so sequences are decoded one by one, which takes several times as long: "
            "pip install numba"
        )
        return None
    try:
        import numba  # noqa: F401
        from llvmlite import binding
    except (ImportError, OSError) as error:  # numba refuses a numpy that is too new, llvmlite may miss a library
        logger.warning(
            "numba cannot be imported (%s), so sequences are decoded one by one, which takes several times as long",
            error,
        )
        return None
    if "x86_64" in binding.get_default_triple() and not binding.get_host_cpu_features().get("f16c"):
        logger.warning("this CPU has no instructions for float16 (F16C), so sequences are decoded one by one")
        return None
    return import_module("baklava.cache.kernels.numba_decode")


def can_fuse(groups: Sequence[HeadGroup], states: Tensor) -> bool:
    """Return whether a kernel can decode the next tokens of these groups, which have the keys `states`."""
    if torch.is_grad_enabled() or states.shape[3] % CHANNEL_MULTIPLE or not all(map(_is_supported, groups)):
        return False
    return _uses_numba(states) or (states.shape[2] == 1 and _uses_triton(states))


def _uses_numba(states: Tensor) -> bool:
    return states.device.type == "cpu" and states.dtype == torch.float32 and kernel() is not None


def _uses_triton(states: Tensor) -> bool:
    return states.shape[3] <= triton_decode.MAX_HEAD_DIM and triton_decode.is_available(states.device)


def _is_supported(group: HeadGroup) -> bool:
    if not group.num_filled or group.is_dequantized:
        return False
    # Expected attention scores a token by its query and all keys.
    return not (group.eviction.scored and group.eviction.query_sample.single_block)


@functools.cache
def prepare(head_dim: int, query_group: int) -> None:
    """Compile the kernel for heads of this dimension and number of queries, unless numba has it on disk.

    The first decode step does it if nobody has. It takes half a minute, and says so if it is not from disk.
    """
    module = None if head_dim % CHANNEL_MULTIPLE else kernel()
    if module is None:
        return
    notice = threading.Timer(
        NOTICE_SECONDS, logger.warning, ["compiling the decode kernel for this CPU, once; it takes half a minute"]
    )
    notice.daemon = True
    notice.start()
    try:
        with _alone():
            _decode(module, _no_rows(head_dim, query_group), AttentionParams(1.0), None, columns.NO_UPDATE)
            _evict([], HeavyHitter(), head_dim)
    finally:
        notice.cancel()


@contextmanager
def _alone() -> Iterator[None]:
    """Let one process of the user compile at a time, so that the others find the code on disk.

    numba itself may give the code of two kernels the same name if two processes save them at once.
    """
    with ExitStack() as stack:
        with suppress(OSError, UserError):  # no folder that takes a lock
            cache_dir().mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(cache_dir() / "kernel.lock"))
        yield


def fused_steps(
    groups: Sequence[HeadGroup],
    table: LayerTable,
    query: GroupedQueries,
    key: KVStates,
    value: KVStates,
    position: int,
    params: AttentionParams,
) -> GroupedQueries:
    """Do what `fused_step` does for one cache, with as many tokens as there are."""
    outputs, start, num_tokens = [], 0, key.shape[2]
    if num_tokens == 1:
        return fused_step([groups], [table], query, key, value, [position], params)
    while start < num_tokens:
        stop = min(start + _tokens_per_step(groups), num_tokens)
        states = query[:, :, :, start:stop], key[:, :, start:stop], value[:, :, start:stop]
        outputs.append(fused_step([groups], [table], *states, [position + start], params))
        start = stop
    return torch.cat(outputs, 3)


def _tokens_per_step(groups: Sequence[HeadGroup]) -> int:
    eviction = groups[0].eviction
    limit = QUERY_BLOCK_SIZE if _update_mode(eviction) == columns.KEEP_PROBS else MAX_STEP_TOKENS
    return min([limit, *(group.tokens_until_eviction for group in groups if isinstance(group, ScoredHeadGroup))])


def fused_step(
    layers: Sequence[Sequence[HeadGroup]],
    tables: Sequence[LayerTable],
    query: GroupedQueries,
    key: KVStates,
    value: KVStates,
    positions: Sequence[int],
    params: AttentionParams,
) -> GroupedQueries:
    """Do what `HeadGroup.attend` does with new tokens of each row one by one, for all KV heads of a layer.

    There is one token, or there are several of which none but the last is followed by an eviction.

    Args:
        layers: The groups of this layer of each cache, all of one plan. A cache has one row or more.
        tables: The table of each cache.
        query: Queries of all rows.
        key: Keys of all rows.
        value: Values of all rows.
        positions: Position of the first new token of each cache.
        params: What the model's attention has in addition.
    """
    rows, heads, _, num_tokens, head_dim = query.shape
    slots, counts = np.empty((2, rows, heads, num_tokens), np.int64)
    own_tables, row_positions, first = [], np.empty((rows, heads), np.int64), 0
    for groups, table, position in zip(layers, tables, positions, strict=True):
        places = [(_reserve_slots(group, position, num_tokens, head_dim), group) for group in groups]
        own_tables.append(table.of(groups))
        here = slice(first, first + len(own_tables[-1]))
        for own, group in places:
            index = list(group.budget.heads)
            slots[here, index], counts[here, index] = own
        row_positions[here] = position
        first = here.stop
    joined = np.concatenate(own_tables)
    if joined.shape[:2] != (rows, heads):
        raise RuntimeError(f"{rows} rows of {heads} KV heads for caches of {joined.shape[0]} rows of {joined.shape[1]}")
    entries = Entries(
        joined.reshape(rows * heads, -1),
        slots.reshape(rows * heads, num_tokens),
        counts.reshape(rows * heads, num_tokens),
        row_positions.ravel(),
    )
    uses_numba, eviction = _uses_numba(key), layers[0][0].eviction
    run = _run_numba if uses_numba else _run_triton
    output, rotated, probs = run(entries, (query, key, value), params, eviction)
    first, due = 0, []
    for groups, own_table, position in zip(layers, own_tables, positions, strict=True):
        here = slice(first, first + len(own_table))
        own_rotated, observed = [part[here] for part in rotated], None if probs is None else probs[here]
        for group in groups:
            if isinstance(group, ScoredHeadGroup):
                _update_scores(group, own_rotated, observed, position, params)
                if not uses_numba or eviction.pooling > 1:
                    group.maybe_evict(num_tokens)
                elif group.count_tokens(num_tokens):
                    due.append(group)
        first = here.stop
    if due:
        _evict(due, eviction, head_dim)
    return output


def _reserve_slots(group: HeadGroup, position: int, num_tokens: int, head_dim: int) -> tuple[list[int], list[int]]:
    """Return the slot of each new token, and the number of entries with it.

    Check what would make the kernel write elsewhere.
    """
    before = group.num_filled
    slots = group.reserve_slots(position, num_tokens)
    counts = [min(before + number, group.budget.tokens) for number in range(1, num_tokens + 1)]
    fits = all(slot < count for slot, count in zip(slots, counts, strict=True)) and counts[-1] <= group.num_slots
    if not fits or group.head_dim != head_dim:
        raise RuntimeError(
            f"slots {slots[0]} to {slots[-1]} of {group.num_filled} in {group.num_slots}: drop the cache after an error"
        )
    return slots, counts


@dataclass(frozen=True)
class Entries:
    """Where the entries of each (sequence, KV head) lie, and where the new ones go: a row for each.

    Slots and counts have a column for each new token, and the positions are those of the first one.
    """

    tables: Table
    slots: np.ndarray
    counts: np.ndarray
    positions: np.ndarray


States = tuple[Tensor, Tensor, Tensor]
"""Queries [rows, heads, group, tokens, head_dim], keys and values [rows, heads, tokens, head_dim] of new tokens."""


def _run_numba(
    entries: Entries, states: States, params: AttentionParams, eviction: Eviction
) -> tuple[Tensor, States, Tensor | None]:
    """Return the output, the states as they are rotated, and the probabilities if the scores need them."""
    rows, heads, group_size, num_tokens, head_dim = states[0].shape
    module, update = kernel(), _update_mode(eviction)
    # Copies, since the kernel rotates them. Under autocast values have 16 bits.
    query, key, value = (part.float().numpy().copy() for part in (states[0].transpose(2, 3), *states[1:]))
    sinks = np.empty((0, 0), np.float32)
    if params.sink_logits is not None:
        sinks = np.tile(params.sink_logits.float().view(heads, group_size).numpy(), (rows, 1))
    size = (rows * heads, num_tokens, group_size, int(entries.counts.max()))
    probs = np.empty(size if update == columns.KEEP_PROBS else (0, 0, 0, 0), np.float32)
    output = np.empty((rows * heads, num_tokens, group_size, head_dim), np.float32)
    prepare(head_dim, group_size)
    _decode(
        module,
        KernelInputs(
            tables=entries.tables,
            slots=entries.slots,
            counts=entries.counts,
            positions=entries.positions,
            query=query.reshape(output.shape),
            key=key.reshape(rows * heads, num_tokens, head_dim),
            value=value.reshape(rows * heads, num_tokens, head_dim),
            output=output,
            sinks=sinks,
            probs=probs,
        ),
        params,
        eviction,
        update,
    )
    rotated = torch.from_numpy(query).transpose(2, 3), torch.from_numpy(key), torch.from_numpy(value)
    observed = torch.from_numpy(probs).unflatten(0, (rows, heads)).transpose(2, 3) if probs.size else None
    return torch.from_numpy(output).unflatten(0, (rows, heads)).transpose(2, 3), rotated, observed


def _run_triton(
    entries: Entries, states: States, params: AttentionParams, eviction: Eviction
) -> tuple[Tensor, States, Tensor | None]:
    """Do what `_run_numba` does on another device, with one token."""
    query, key, value = states[0][:, :, :, 0], states[1][:, :, 0], states[2][:, :, 0]
    device, shape = query.device, query.shape[:2]
    rows, heads, group_size, head_dim = query.shape
    update, longest = _update_mode(eviction), int(entries.counts.max())
    tables, slots, counts, positions = (
        torch.from_numpy(part).to(device)
        for part in (entries.tables, entries.slots[:, 0], entries.counts[:, 0], entries.positions)
    )
    sinks = torch.empty(0, 0, device=device)
    if params.sink_logits is not None:
        sinks = params.sink_logits.float().view(heads, group_size).repeat(rows, 1)
    size = (rows * heads, group_size, longest) if update == columns.KEEP_PROBS else (0, 0, 0)
    probs = torch.empty(size, dtype=torch.float32, device=device)
    output = query.new_empty(rows * heads, group_size, head_dim)
    hitter = eviction if isinstance(eviction, HeavyHitter) else HeavyHitter()
    rotated = triton_decode.decode_layer(
        tables=tables,
        slots=slots,
        counts=counts,
        positions=positions,
        query=query.flatten(0, 1),
        key=key.flatten(0, 1),
        value=value.flatten(0, 1),
        output=output,
        sinks=sinks,
        probs=probs,
        scaling=params.scaling,
        softcap=params.softcap or 0.0,
        update=update,
        distance=hitter.distance,
        squared=hitter.power == 2,
        by_max=hitter.reduction == "max",
        max_entries=longest,
        dense_dtype=stored_dtype(query.dtype, FULL_BITS),
    ).unflatten(0, shape)
    observed = probs.unflatten(0, shape)[:, :, :, None] if probs.numel() else None
    parts = rotated[:, :, :group_size, None], rotated[:, :, None, group_size], rotated[:, :, None, group_size + 1]
    return output.unflatten(0, shape)[:, :, :, None], parts, observed


@dataclass(frozen=True)
class KernelInputs:
    """The arrays of one call, with a row for each (sequence, KV head), as `numba_decode.decode_layer` takes them."""

    tables: Table
    slots: np.ndarray
    counts: np.ndarray
    positions: np.ndarray
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    output: np.ndarray
    sinks: np.ndarray
    probs: np.ndarray


def _no_rows(head_dim: int, query_group: int) -> KernelInputs:
    tables, numbers = np.empty((0, columns.NUM_COLUMNS), np.int64), np.empty((0, 0), np.int64)
    states, queries = np.empty((0, 0, head_dim), np.float32), np.empty((0, 0, query_group, head_dim), np.float32)
    sinks, probs = np.empty((0, 0), np.float32), np.empty((0, 0, 0, 0), np.float32)
    return KernelInputs(tables, numbers, numbers, numbers.ravel(), queries, states, states, queries, sinks, probs)


def _decode(
    module: Any,
    inputs: KernelInputs,
    params: AttentionParams,
    eviction: Eviction | None,
    update: int,
) -> None:
    hitter = eviction if isinstance(eviction, HeavyHitter) else HeavyHitter()
    group_size, head_dim = inputs.query.shape[2:]
    options = (
        np.float32(params.scaling),
        np.float32(params.softcap or 0),
        update,
        hitter.distance,
        hitter.power == 2,
        hitter.reduction == "max",
        (0,) * head_dim,
        (0,) * (head_dim // 2),
        (0,) * group_size,
    )

    def decode(rows: slice) -> None:
        module.decode_layer(
            inputs.tables[rows],
            inputs.slots[rows],
            inputs.counts[rows],
            inputs.positions[rows],
            inputs.query[rows],
            inputs.key[rows],
            inputs.value[rows],
            inputs.output[rows],
            inputs.sinks[rows],
            inputs.probs[rows],
            *options,
        )

    _run_on_threads(decode, inputs.counts.sum(1))


def _run_on_threads(run: Callable[[slice], None], work: np.ndarray) -> None:
    """Run a function on all rows: on as many threads as PyTorch uses, if that is worth it.

    The threads sleep while they wait, and the function must not hold Python's lock.

    Args:
        run: Takes adjacent rows.
        work: Entries that each row reads, over all of its tokens.
    """
    ends = work.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    threads = min(torch.get_num_threads(), total // MIN_THREAD_ENTRIES)
    if threads < 2:
        run(slice(None))
        return
    shares = np.arange(1, threads) * (total / threads)
    stops = [0, *np.searchsorted(ends - work / 2, shares).tolist(), len(work)]
    first, *others = [slice(start, stop) for start, stop in pairwise(stops)]
    running = [_thread_pool(threads - 1).submit(run, rows) for rows in others]
    try:
        run(first)
    finally:
        wait(running)
    for each in running:
        each.result()


@functools.cache
def _thread_pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "decode-kernel")


def _update_mode(eviction: Eviction) -> int:
    """Return what becomes of the probabilities of a decoded token."""
    if not eviction.scored or eviction.query_sample.window == 0:
        return columns.NO_UPDATE
    return columns.HEAVY_HITTER if isinstance(eviction, HeavyHitter) else columns.KEEP_PROBS


def _update_scores(
    group: ScoredHeadGroup, rotated: Sequence[Tensor], probs: Tensor | None, position: int, params: AttentionParams
) -> None:
    """Update the scores that the kernel does not update, by tokens the first of which is at this position."""
    num_tokens = rotated[1].shape[2]
    if probs is not None:
        query, own = rotated[0][:, group.index], probs[:, group.index, ..., : group.num_filled]
        group.observe_attention(query, own, position, params.scaling)
    elif group.eviction.query_sample.window == 0 and group.is_about_to_evict(num_tokens):
        query, key, value = (part[:, group.index] for part in rotated)
        at = torch.arange(position, position + num_tokens, device=query.device)[None]
        tokens = NewTokens(position, query, key, value, at, padded=False, teacher_forced=False)
        group.observe_entries(tokens, params)


def _evict(groups: Sequence[ScoredHeadGroup], eviction: Eviction, head_dim: int) -> None:
    """Evict entries of these groups in the compiled kernel."""
    parts = [group.table.reshape(-1, columns.NUM_COLUMNS) for group in groups]
    numbers = [
        np.repeat(
            np.array([[each.num_filled, each.num_retained, eviction.recent_window(each.budget.tokens)]]), len(part), 0
        )
        for each, part in zip(groups, parts, strict=True)
    ]
    tables = np.concatenate([np.empty((0, columns.NUM_COLUMNS), np.int64), *parts])
    counts, retained, recent = np.concatenate([np.empty((0, 3), np.int64), *numbers]).T.copy()
    power = np.float32(eviction.attention_power)
    module = kernel()

    def evict(rows: slice) -> None:
        own = tables[rows], counts[rows], retained[rows], recent[rows]
        module.evict_layer(*own, eviction.sinks, power, (0,) * head_dim)

    _run_on_threads(evict, counts * EVICTION_WORK)
    for group in groups:
        group.note_eviction()


def _group_table(group: HeadGroup) -> Table:
    """Return the rows of a group: [batch, heads, columns]."""
    if group.table is None:
        group.table = _make_table(group)
    elif CHECK_TABLES and not np.array_equal(group.table, _make_table(group)):
        raise RuntimeError(f"entries of {group.budget} have moved, but their table was not made again")
    return group.table


def _make_table(group: HeadGroup) -> Table:
    shape, head_dim = (len(group.keys.tensors[0]), len(group.budget.heads)), group.head_dim
    table = np.zeros((*shape, columns.NUM_COLUMNS), np.int64)
    if isinstance(group, ScoredHeadGroup):
        table[..., columns.POSITIONS] = _addresses(group.positions)
        table[..., columns.SCORES] = _addresses(group.scores)
        if group.centroids is not None:
            table[..., columns.CENTROIDS] = group.centroids.key.shape[2]
            for column, tensor in enumerate(group.centroids.tensors, columns.CENTROID_KEY):
                table[..., column] = _addresses(tensor)
    if group.key_rotation is not None:
        channels = group.budget.key_bit_split(head_dim)[0][0]
        table[..., columns.KEY_BLOCK] = channels & -channels
        if (order := group.key_rotation.order) is not None:
            table[..., columns.CHANNEL_ORDER] = order.data_ptr() + np.arange(shape[1]) * head_dim * order.itemsize
    if group.value_rotation is not None:
        table[..., columns.VALUE_BLOCK] = head_dim & -head_dim
    _fill_storage(table[..., columns.KEY : columns.VALUE], group.keys)
    _fill_storage(table[..., columns.VALUE :], group.values)
    return table


def _fill_storage(table: Table, storage: Storage) -> None:
    if isinstance(storage, SegmentedStorage):
        segments = storage.segments
    else:
        assert isinstance(storage, SlotStorage)
        segments = [Segment(0, columns.NO_SLOT, storage)]
    table[..., columns.DENSE_BYTES] = 2
    table[..., columns.QUANTIZED_START] = table[..., columns.QUANTIZED_STOP] = segments[0].stop
    for segment in segments:
        codec, encoded = segment.storage.codec, segment.storage.encoded
        if isinstance(codec, DenseCodec):
            table[..., columns.RECENT if segment.start else columns.SINKS] = _addresses(encoded[0])
            table[..., columns.DENSE_BYTES] = encoded[0].itemsize
            continue
        table[..., columns.QUANTIZED_START], table[..., columns.QUANTIZED_STOP] = segment.start, segment.stop
        parts = codec.codecs if isinstance(codec, MixedPrecisionCodec) else [codec]
        table[..., columns.FIRST_CHANNELS] = parts[0].head_dim  # type: ignore[attr-defined]
        for part, packed, scales, first in zip(
            parts, encoded[::2], encoded[1::2], (columns.FIRST_BITS, columns.SECOND_BITS), strict=False
        ):
            assert isinstance(part, QuantizedCodec)
            table[..., first] = part.bits
            table[..., first + 1] = _addresses(packed)
            table[..., first + 2] = _addresses(scales)
            table[..., first + 3] = 0 if part.mean is None else _addresses(part.mean)


def _addresses(tensor: Tensor) -> Table:
    """Return the address of the first slot of each row and head: [batch, heads]; the slots follow one another."""
    assert tensor.numel() == 0 or tensor[0, 0].is_contiguous()
    rows, heads = (np.arange(size) * step for size, step in zip(tensor.shape[:2], tensor.stride()[:2], strict=True))
    return tensor.data_ptr() + (rows[:, None] + heads) * tensor.itemsize
