"""Decode steps of one layer as one compiled function: all sequences and KV heads, over entries where they lie.

`decode_layer` stores the new tokens of each (sequence, KV head), attends, updates the scores of heavy hitters, and
evicts. `evict_layer` evicts by the scores of other methods. Rotations, codes, scores and centroids are those of
`baklava.cache.storage`, `baklava.eviction` and `baklava.cache.head_groups`, which are the reference in the tests.

A code lies in planes of 4, 2 and 1 bits (`baklava.cache.storage.quantized_codec.pack`). LLVM makes vectors of a loop
only if its length is a constant, if it is no shorter than a vector, and if few pointers may overlap. So numbers are the
lengths of tuples, which are constants of a compiled function, and the loop over the channels of an entry is written out
per plane and query head. It takes 8 to 25 ns per entry, where general loops take 50 to 100 ns.

All of it is in one file, since numba compiles again only if the file of a function has changed. What is imported of
`quantized_codec` and `table_columns` is an exception, for which `drop_stale_code` looks. A function is compiled again
in each one that calls it, so few calls and few levels save seconds of compilation.
"""

import inspect
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from baklava.cache import table_columns
from baklava.cache.storage.quantized_codec import MAX_STRETCH, NORMAL_STEP_SIZES, PLANE_WIDTHS
from baklava.cache.table_columns import (
    BY_MAX,
    CAPACITY,
    CENTROID_ENTROPY,
    CENTROID_KEY,
    CENTROID_VALUE,
    CENTROID_WEIGHT,
    CENTROIDS,
    CHANNEL_ORDER,
    DENSE_BYTES,
    DISTANCE,
    EVICTS,
    FILLED,
    FIRST_BITS,
    FIRST_CHANNELS,
    FIRST_CODES,
    FIRST_SCALES,
    HEAVY_HITTER,
    INTERVAL,
    KEEP_PROBS,
    KEY,
    KEY_BLOCK,
    LAST_POSITION,
    NUM_COLUMNS,
    NUM_STORAGE_COLUMNS,
    POSITIONS,
    POWER,
    QUANTIZED_START,
    QUANTIZED_STOP,
    RECENT,
    RECENT_WINDOW,
    RESIDUAL_START,
    RETAINED,
    RING_LENGTH,
    SCORES,
    SECOND_BITS,
    SECOND_CODES,
    SECOND_SCALES,
    SINCE_EVICTION,
    SINK_TOKENS,
    SINKS,
    SLOTS,
    SQUARED,
    UPDATE,
    VALUE,
    VALUE_BLOCK,
)

PLANES = np.array([(0, 0, 0), *((*PLANE_WIDTHS[bits], 0, 0)[:3] for bits in range(1, 9))], np.int64)
STEP_SIZES = np.array([0, *(NORMAL_STEP_SIZES[bits] for bits in range(1, 9))], np.float32)
MAX_FLOAT16 = np.float32(65504.0)
MIN_STEP = np.float32(np.finfo(np.float32).tiny)
MIN_WEIGHT = np.float32(1e-12)
ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
BITS, CODES, SCALES, MEAN = range(4)
"""Columns of a part of quantized entries, from its first one on."""

INFINITY = np.float32(np.inf)
LOWEST = np.float32(np.finfo(np.float32).min)
PROTECTED = np.float32(np.finfo(np.float32).max)
HIGHEST = np.float32(3e38)
"""A rank below `PROTECTED`, for scores that are not finite."""

FAST_MATH = {"nsz", "arcp", "contract", "afn", "reassoc"}


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function at its first call, and keep the code on disk if there is a folder for it."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": FAST_MATH}
    function = inspect.unwrap(function)  # numba cannot compile what a type checker wraps around it
    try:
        dispatcher = njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no folder that it can write
        return njit(**options)(function)
    save = dispatcher._cache.save_overload

    def save_if_possible(signature: Any, code: Any) -> None:
        with suppress(OSError):  # the disk is full, or the quota of the user
            save(signature, code)

    dispatcher._cache.save_overload = save_if_possible
    return dispatcher


def dot_codes(packed: Any, query: Any, output: Any, bits: Any, channels: Any, group: Any) -> None:
    """Write the products of the codes of each entry with the queries.

    Args:
        packed: Bytes [slots, bytes].
        query: float32 [group, channels].
        output: float32 [group, slots or more], which is written.
        bits: A literal.
        channels: A tuple of as many elements.
        group: A tuple of as many elements.
    """


@overload(dot_codes, prefer_literal=True)
def _dot_codes(packed, query, output, bits, channels, group):
    count, heads, planes = channels.count, range(group.count), _planes(bits.literal_value, channels.count)
    lanes = min(plane[3] for plane in planes)
    lines = ["for s in range(packed.shape[0]):", *(f"    total{g} = np.float32(0)" for g in heads)]
    lines.append(f"    for j in range({lanes}):")
    for first in range(0, count, lanes):
        fields = []
        for start, shift, width, size in planes:
            place, offset = divmod(first, size)
            fields.append(_field(f"packed[s, {start + offset} + j]", place * width, width, shift))
        lines.append(f"        code = np.float32({' | '.join(fields)})")
        lines += [f"        total{g} += query[{g}, {first} + j] * code" for g in heads]
    lines += [f"    output[{g}, s] = total{g}" for g in heads]
    return _function("packed, query, output, bits, channels, group", lines)


def add_codes(packed: Any, words: Any, weights: Any, output: Any, bits: Any, channels: Any, group: Any) -> None:
    """Add the codes of all entries, weighted.

    Args:
        packed: Bytes [slots, bytes].
        words: The same as words of 32 bits.
        weights: float32 [group, slots or more].
        output: float32 [group, channels], which is changed.
        bits: A literal.
        channels: A tuple of as many elements.
        group: A tuple of as many elements.
    """


@overload(add_codes, prefer_literal=True)
def _add_codes(packed, words, weights, output, bits, channels, group):
    count, heads, planes = channels.count, range(group.count), _planes(bits.literal_value, channels.count)
    lanes = max(plane[3] for plane in planes) if bits.literal_value >= 4 else count // 2
    before, lines = [], ["for s in range(packed.shape[0]):"]
    sources = []
    for number, (start, _, width, size) in enumerate(planes):
        if size == lanes:
            sources.append(f"packed[s, {start} + j]")
            continue
        # A narrow plane is copied until it is as wide as the loop; each copy is shifted down to the next place.
        before += [f"wide{number} = np.empty({lanes}, np.uint8)", f"into{number} = wide{number}.view(np.uint32)"]
        sources.append(f"wide{number}[j]")
        for word in range(size // 4):
            lines.append(f"    word = words[s, {start // 4 + word}]")
            for copy in range(lanes // size):
                into = copy * (size // 4) + word
                lines.append(f"    into{number}[{into}] = word >> np.uint32({width * copy})")
    lines += [f"    weight{g} = weights[{g}, s]" for g in heads]
    for part in range(count // lanes):
        fields = [
            _field(source, width * (lanes // size) * part, width, shift)
            for source, (_, shift, width, size) in zip(sources, planes, strict=True)
        ]
        lines += [f"    for j in range({lanes}):", f"        code = np.float32({' | '.join(fields)})"]
        lines += [f"        output[{g}, {part * lanes} + j] += weight{g} * code" for g in heads]
    return _function("packed, words, weights, output, bits, channels, group", before + lines)


def _planes(bits: int, channels: int) -> list[tuple[int, int, int, int]]:
    """Return the first byte, the place in a code, the width in bits and the bytes of each plane of an entry."""
    planes, start, shift = [], 0, 0
    for width in PLANE_WIDTHS[bits]:
        size = channels * width // 8
        planes.append((start, shift, width, size))
        start, shift = start + size, shift + width
    return planes


def _field(source: str, down: int, width: int, up: int) -> str:
    """Return the expression of the field at `down` of a byte, moved to its place in a code."""
    mask = f"& np.int32({(1 << width) - 1})" if width < 8 else ""
    return f"(((np.int32({source}) >> np.int32({down})) {mask}) << np.int32({up}))"


def _function(arguments: str, lines: list[str]) -> Callable[..., None]:
    namespace: dict[str, Any] = {"np": np}
    exec(f"def compiled({arguments}):\n    " + "\n    ".join(lines), namespace)
    compiled: Callable[..., None] = namespace["compiled"]
    return compiled


@intrinsic
def _pointer(typing_context, address):
    """Return the pointer to an address."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def _from_half(typing_context, number):
    """Return the float32 of the bits of a float16."""

    def generate(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _to_half(typing_context, number):
    """Return the bits of the float16 that is nearest to a float32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def _from_bits(typing_context, number):
    """Return the float32 of these bits."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


_COLUMNS = {name: value for name, value in vars(table_columns).items() if name.isupper()}
LAYOUT = zlib.crc32(repr((_COLUMNS, PLANE_WIDTHS, NORMAL_STEP_SIZES)).encode())
"""What is imported of other files, of which the compiled code has a copy."""


@compiled
def layout():
    """Return `LAYOUT` as it was when the code on disk was compiled."""
    return LAYOUT


def drop_stale_code() -> None:
    """Remove code on disk that was compiled for other columns: it would write to wrong addresses."""
    if layout() != LAYOUT:
        for file in Path(layout._cache.cache_path).glob("numba_decode.*"):
            file.unlink(missing_ok=True)


@compiled
def exp(x):
    """Return e to the power of x, for x of at most 0; LLVM makes vectors of it, as it does not of the library's."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.44269504) + HALF)
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + ONE
    return p * _from_bits(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))


@compiled
def _hadamard(x, block):
    """Rotate blocks of channels in place; the rotation is its own inverse."""
    width = 1
    while width < block:
        for start in range(0, x.shape[0], 2 * width):
            for j in range(start, start + width):
                first, second = x[j], x[j + width]
                x[j], x[j + width] = first + second, first - second
        width *= 2
    scale = ONE / np.sqrt(np.float32(block))
    for j in range(x.shape[0]):
        x[j] *= scale


@compiled
def _rotate_key(x, block, order_address, scratch):
    channels = x.shape[0]
    if order_address != 0:
        order = carray(_pointer(order_address), channels, np.int64)
        for j in range(channels):
            scratch[j] = x[order[j]]
        for j in range(channels):
            x[j] = scratch[j]
    if block != 0:
        _hadamard(x, block)


@compiled
def _dot_packed(packed, query, output, bits, channels, group):
    if bits == 8:
        dot_codes(packed, query, output, 8, channels, group)
    elif bits == 7:
        dot_codes(packed, query, output, 7, channels, group)
    elif bits == 6:
        dot_codes(packed, query, output, 6, channels, group)
    elif bits == 5:
        dot_codes(packed, query, output, 5, channels, group)
    elif bits == 4:
        dot_codes(packed, query, output, 4, channels, group)
    elif bits == 3:
        dot_codes(packed, query, output, 3, channels, group)
    elif bits == 2:
        dot_codes(packed, query, output, 2, channels, group)
    else:
        dot_codes(packed, query, output, 1, channels, group)


@compiled
def _add_packed(packed, words, weights, output, bits, channels, group):
    if bits == 8:
        add_codes(packed, words, weights, output, 8, channels, group)
    elif bits == 6:
        add_codes(packed, words, weights, output, 6, channels, group)
    elif bits == 5:
        add_codes(packed, words, weights, output, 5, channels, group)
    elif bits == 4:
        add_codes(packed, words, weights, output, 4, channels, group)
    elif bits == 3:
        add_codes(packed, words, weights, output, 3, channels, group)
    else:
        add_codes(packed, words, weights, output, 2, channels, group)


@compiled
def _pack(codes, bits, channels, packed, start):
    shift = 0
    for plane in range(3):
        width = PLANES[bits, plane]
        if width == 0:
            break
        count, mask = channels * width // 8, (1 << width) - 1
        for j in range(count):
            byte = 0
            for place in range(8 // width):
                byte |= ((np.int64(codes[place * count + j]) >> shift) & mask) << (place * width)
            packed[start + j] = np.uint8(byte)
        start += count
        shift += width


@compiled
def _write_quantized(x, part, slot, codes, scratch):
    """Quantize these channels of an entry into a slot; `part` has their bits and addresses."""
    channels, bits, mean_address = x.shape[0], part[BITS], part[MEAN]
    squares, largest = ZERO, ZERO
    for j in range(channels):
        scratch[j] = x[j]
    if mean_address != 0:
        mean = carray(_pointer(mean_address), channels, np.uint16)
        for j in range(channels):
            scratch[j] -= _from_half(mean[j])
    for j in range(channels):
        squares += scratch[j] * scratch[j]
        largest = max(largest, abs(scratch[j]))
    half = np.float32((1 << bits) - 1) * HALF
    step = np.sqrt(squares / np.float32(channels)) * STEP_SIZES[bits]
    step = max(min(step, largest / half), MIN_STEP)
    products, levels = ZERO, ZERO
    for j in range(channels):
        code = min(max(np.rint(scratch[j] / step + half), ZERO), np.float32(2) * half)
        level = code - half
        products += scratch[j] * level
        levels += level * level
        codes[j] = np.uint8(code)
    size = channels * bits // 8
    packed = carray(_pointer(part[CODES]), (slot + 1) * size, np.uint8)
    _pack(codes, bits, channels, packed, slot * size)
    scales = carray(_pointer(part[SCALES]), slot + 1, np.uint16)
    scale = min(squares / max(products, MIN_STEP), np.float32(MAX_STRETCH) * products / levels)
    scales[slot] = _to_half(min(scale, MAX_FLOAT16))


@compiled
def _write_dense(x, address, itemsize, slot):
    channels = x.shape[0]
    if itemsize == 4:
        entries = carray(_pointer(address), (slot + 1) * channels, np.float32)
        for j in range(channels):
            entries[slot * channels + j] = x[j]
    else:
        halves = carray(_pointer(address), (slot + 1) * channels, np.uint16)
        for j in range(channels):
            halves[slot * channels + j] = _to_half(x[j])


@compiled
def _storage(table, part):
    """Return the columns of the keys (0) or of the values (1)."""
    start = KEY + part * NUM_STORAGE_COLUMNS
    return table[start : start + NUM_STORAGE_COLUMNS]


@compiled
def _write(x, table, slot, codes, scratch):
    """Write one rotated entry into a slot."""
    if slot < table[QUANTIZED_START]:
        _write_dense(x, table[SINKS], table[DENSE_BYTES], slot)
        return
    if slot >= table[QUANTIZED_STOP]:
        _write_dense(x, table[RECENT], table[DENSE_BYTES], slot - table[QUANTIZED_STOP])
        return
    slot -= table[QUANTIZED_START]
    start, stop, part = 0, table[FIRST_CHANNELS], table[FIRST_BITS:SECOND_BITS]
    while start < x.shape[0]:
        _write_quantized(x[start:stop], part, slot, codes, scratch)
        start, stop, part = stop, x.shape[0], table[SECOND_BITS:]


@compiled
def _dense_logits(query, address, itemsize, count, scaling, logits, entry, channels):
    """Write the logits of the first `count` entries of a dense segment."""
    halves = carray(_pointer(address), (count, len(channels)), np.uint16)
    floats = carray(_pointer(address), (count, len(channels)), np.float32)
    for slot in range(count):
        if itemsize == 4:
            for j in range(len(channels)):
                entry[j] = floats[slot, j]
        else:
            for j in range(len(channels)):
                entry[j] = _from_half(halves[slot, j])
        for g in range(query.shape[0]):
            total = ZERO
            for j in range(len(channels)):
                total += query[g, j] * entry[j]
            logits[g, slot] = total * scaling


@compiled
def _quantized_logits(query, part, count, scaling, logits, products, channels, group):
    """Add the logits that these channels give to the first `count` quantized entries; see `_write_quantized`."""
    bits, mean_address = part[BITS], part[MEAN]
    half = np.float32((1 << bits) - 1) * HALF
    packed = carray(_pointer(part[CODES]), (count, len(channels) * bits // 8), np.uint8)
    scales = carray(_pointer(part[SCALES]), count, np.uint16)
    _dot_packed(packed, query, products, bits, channels, group)
    for g in range(len(group)):
        middle, offset = ZERO, ZERO
        for j in range(len(channels)):
            middle += query[g, j] * half
        if mean_address != 0:
            mean = carray(_pointer(mean_address), len(channels), np.uint16)
            for j in range(len(channels)):
                offset += query[g, j] * _from_half(mean[j])
        for slot in range(count):
            logits[g, slot] += ((products[g, slot] - middle) * _from_half(scales[slot]) + offset) * scaling


@compiled
def _logits(query, table, count, scaling, logits, products, entry, channels, half, group):
    """Write the logits of all entries, without softcap."""
    begin, end, stop = table[QUANTIZED_START], min(table[QUANTIZED_STOP], count), table[QUANTIZED_STOP]
    _dense_logits(query, table[SINKS], table[DENSE_BYTES], min(begin, count), scaling, logits, entry, channels)
    if end > begin:
        own = logits[:, begin:]
        for g in range(len(group)):
            for slot in range(end - begin):
                own[g, slot] = ZERO
        if table[FIRST_CHANNELS] == len(channels):
            part = table[FIRST_BITS:SECOND_BITS]
            _quantized_logits(query, part, end - begin, scaling, own, products, channels, group)
        else:
            start, part = 0, table[FIRST_BITS:SECOND_BITS]
            while start < len(channels):
                some = query[:, start : start + len(half)].copy()
                _quantized_logits(some, part, end - begin, scaling, own, products, half, group)
                start, part = start + len(half), table[SECOND_BITS:]
    if count > stop:
        recent = logits[:, stop:]
        _dense_logits(query, table[RECENT], table[DENSE_BYTES], count - stop, scaling, recent, entry, channels)


@compiled
def _add_dense_values(probs, address, itemsize, count, output, entry, channels):
    """Add the first `count` values of a dense segment, weighted by their probabilities."""
    # Entries are read as in `_dense_logits`; a function that reads them in both takes a full plan 1.8 times as long.
    halves = carray(_pointer(address), (count, len(channels)), np.uint16)
    floats = carray(_pointer(address), (count, len(channels)), np.float32)
    for slot in range(count):
        if itemsize == 4:
            for j in range(len(channels)):
                entry[j] = floats[slot, j]
        else:
            for j in range(len(channels)):
                entry[j] = _from_half(halves[slot, j])
        for g in range(output.shape[0]):
            weight = probs[g, slot]
            for j in range(len(channels)):
                output[g, j] += weight * entry[j]


@compiled
def _add_values(probs, table, count, output, weights, entry, channels, group):
    """Add the values of all entries, weighted by their probabilities."""
    begin, end, stop = table[QUANTIZED_START], min(table[QUANTIZED_STOP], count), table[QUANTIZED_STOP]
    if end > begin:
        bits, size = table[FIRST_BITS], len(channels) * table[FIRST_BITS] // 8
        packed = carray(_pointer(table[FIRST_CODES]), (end - begin, size), np.uint8)
        words = carray(_pointer(table[FIRST_CODES]), (end - begin, size // 4), np.uint32)
        scales = carray(_pointer(table[FIRST_SCALES]), end - begin, np.uint16)
        for g in range(len(group)):
            for slot in range(end - begin):
                weights[g, slot] = probs[g, begin + slot] * _from_half(scales[slot])
        _add_packed(packed, words, weights, output, bits, channels, group)
        half = np.float32((1 << bits) - 1) * HALF
        for g in range(len(group)):
            total = ZERO
            for slot in range(end - begin):
                total += weights[g, slot]
            for j in range(len(channels)):
                output[g, j] -= total * half
    _add_dense_values(probs, table[SINKS], table[DENSE_BYTES], min(begin, count), output, entry, channels)
    if count > stop:
        recent = probs[:, stop:]
        _add_dense_values(recent, table[RECENT], table[DENSE_BYTES], count - stop, output, entry, channels)


@compiled
def _softmax(logits, count, sink, has_sink):
    """Replace the logits by probabilities; a learned sink takes part, and is not one of them."""
    largest = logits[0]
    for t in range(count):
        largest = max(largest, logits[t])
    if has_sink:
        largest = max(largest, sink)
    total = ZERO
    for t in range(count):
        logits[t] = exp(logits[t] - largest)
        total += logits[t]
    if has_sink:
        total += np.exp(sink - largest)
    inverse = ONE / total
    for t in range(count):
        logits[t] *= inverse


@compiled
def _add_centroid_biases(table, count, logits):
    centroids = table[CENTROIDS]
    weights = carray(_pointer(table[CENTROID_WEIGHT]), centroids, np.float32)
    entropies = carray(_pointer(table[CENTROID_ENTROPY]), centroids, np.float32)
    for index in range(centroids):
        bias = LOWEST
        if weights[index] > ZERO:
            weight = max(weights[index], MIN_WEIGHT)
            bias = np.log(weight) - entropies[index] / weight
        for g in range(logits.shape[0]):
            logits[g, count + index] = max(logits[g, count + index] + bias, LOWEST)


@compiled
def _update_heavy_hitters(probs, table, count, position):
    """Update running means of the attention that entries get from queries at least DISTANCE after them."""
    group, distance = probs.shape[0], table[DISTANCE]
    squared, by_max = table[SQUARED] != 0, table[BY_MAX] != 0
    positions = carray(_pointer(table[POSITIONS]), count, np.int32)
    scores = carray(_pointer(table[SCORES]), count, np.float32)
    share = ONE / np.float32(group)
    for t in range(count):
        attention = probs[0, t]
        for g in range(1, group):
            attention = max(attention, probs[g, t]) if by_max else attention + probs[g, t]
        if not by_max:
            attention *= share
        if squared:
            attention *= attention
        before = np.int32(position) - positions[t] - np.int32(distance)
        if before >= 0:
            queries = np.float32(before)
            scores[t] = (scores[t] * queries + attention) / (queries + ONE)


@compiled
def _store(key, value, table, slot, position, codes, entry):
    """Rotate a new entry, and write it into its slot."""
    _rotate_key(key, table[KEY_BLOCK], table[CHANNEL_ORDER], entry)
    if table[VALUE_BLOCK] != 0:
        _hadamard(value, table[VALUE_BLOCK])
    for part in range(2):
        _write(key if part == 0 else value, _storage(table, part), slot, codes, entry)
    if table[POSITIONS] != 0:
        carray(_pointer(table[POSITIONS]), slot + 1, np.int32)[slot] = np.int32(position)
        carray(_pointer(table[SCORES]), slot + 1, np.float32)[slot] = ZERO


@compiled
def _probs(query, table, count, sinks, scaling, softcap, space, products, entry, channels, half, group):
    """Write the probabilities of all entries, and those of the centroids after them."""
    centroids = table[CENTROIDS]
    total = count + centroids
    _logits(query, table[KEY:VALUE], count, scaling, space, products, entry, channels, half, group)
    if centroids > 0:
        after = space[:, count:]
        _dense_logits(query, table[CENTROID_KEY], 2, centroids, scaling, after, entry, channels)
    if softcap > 0:
        for g in range(len(group)):
            for t in range(total):
                space[g, t] = np.tanh(space[g, t] / softcap) * softcap
    if centroids > 0:
        _add_centroid_biases(table, count, space)
    for g in range(len(group)):
        _softmax(space[g], total, sinks[g] if sinks.size else ZERO, sinks.size > 0)


@compiled
def _output(space, table, count, output, products, entry, channels, group):
    """Write the sum of all values and centroids, weighted by their probabilities."""
    for g in range(len(group)):
        for j in range(len(channels)):
            output[g, j] = ZERO
    _add_values(space, table[VALUE:], count, output, products, entry, channels, group)
    if table[CENTROIDS] > 0:
        _add_dense_values(space[:, count:], table[CENTROID_VALUE], 2, table[CENTROIDS], output, entry, channels)
    if table[VALUE_BLOCK] != 0:
        for g in range(len(group)):
            _hadamard(output[g], table[VALUE_BLOCK])


@compiled
def _read_quantized(x, part, slot, codes):
    """Read these channels of a quantized entry; `part` has their bits and addresses."""
    channels, bits = x.shape[0], part[BITS]
    size, half = channels * bits // 8, np.float32((1 << bits) - 1) * HALF
    packed = carray(_pointer(part[CODES]), (slot + 1, size), np.uint8)
    scale = _from_half(carray(_pointer(part[SCALES]), slot + 1, np.uint16)[slot])
    for j in range(channels):
        codes[j] = np.uint8(0)
    start, shift = 0, 0
    for plane in range(3):
        width = PLANES[bits, plane]
        if width == 0:
            break
        count, mask = channels * width // 8, (1 << width) - 1
        for place in range(8 // width):
            for j in range(count):
                codes[place * count + j] |= np.uint8(((packed[slot, start + j] >> (place * width)) & mask) << shift)
        start += count
        shift += width
    for j in range(channels):
        x[j] = (np.float32(codes[j]) - half) * scale
    if part[MEAN] != 0:
        mean = carray(_pointer(part[MEAN]), channels, np.uint16)
        for j in range(channels):
            x[j] += _from_half(mean[j])


@compiled
def _read_dense(x, address, itemsize, slot):
    halves = carray(_pointer(address), (slot + 1, x.shape[0]), np.uint16)
    floats = carray(_pointer(address), (slot + 1, x.shape[0]), np.float32)
    for j in range(x.shape[0]):
        x[j] = floats[slot, j] if itemsize == 4 else _from_half(halves[slot, j])


@compiled
def _read(x, table, slot, codes):
    """Read one entry in rotated channels."""
    if slot < table[QUANTIZED_START]:
        _read_dense(x, table[SINKS], table[DENSE_BYTES], slot)
        return
    if slot >= table[QUANTIZED_STOP]:
        _read_dense(x, table[RECENT], table[DENSE_BYTES], slot - table[QUANTIZED_STOP])
        return
    slot -= table[QUANTIZED_START]
    start, stop, part = 0, table[FIRST_CHANNELS], table[FIRST_BITS:SECOND_BITS]
    while start < x.shape[0]:
        _read_quantized(x[start:stop], part, slot, codes)
        start, stop, part = stop, x.shape[0], table[SECOND_BITS:]


@compiled
def _copy_bytes(address, width, source, target):
    rows = carray(_pointer(address), (max(source, target) + 1, width), np.uint8)
    for j in range(width):
        rows[target, j] = rows[source, j]


@compiled
def _move(table, source, target, x, codes, scratch):
    """Move an entry to another slot. It is encoded again only if the slot is in another segment."""
    start, stop, channels = table[QUANTIZED_START], table[QUANTIZED_STOP], x.shape[0]
    if (source < start) != (target < start) or (source < stop) != (target < stop):
        _read(x, table, source, codes)
        _write(x, table, target, codes, scratch)
    elif source < start:
        _copy_bytes(table[SINKS], channels * table[DENSE_BYTES], source, target)
    elif source >= stop:
        _copy_bytes(table[RECENT], channels * table[DENSE_BYTES], source - stop, target - stop)
    else:
        source, target, first = source - start, target - start, table[FIRST_CHANNELS]
        _copy_bytes(table[FIRST_CODES], first * table[FIRST_BITS] // 8, source, target)
        _copy_bytes(table[FIRST_SCALES], 2, source, target)
        if first < channels:
            _copy_bytes(table[SECOND_CODES], (channels - first) * table[SECOND_BITS] // 8, source, target)
            _copy_bytes(table[SECOND_SCALES], 2, source, target)


@compiled
def read_entries(addresses, part, entries):
    """Read the first entries of each (sequence, KV head), in rotated channels.

    Args:
        addresses: Address of each row of a table.
        part: 0 for keys, 1 for values.
        entries: float32 [rows, entries, head_dim], which is written.
    """
    codes = np.empty(entries.shape[2], np.uint8)
    for row in range(len(addresses)):
        storage = _storage(carray(_pointer(addresses[row]), NUM_COLUMNS, np.int64), part)
        for slot in range(entries.shape[1]):
            _read(entries[row, slot], storage, slot, codes)


@compiled
def select_entries(addresses, part, sources, num_old, new):
    """Fill the first slots of each (sequence, KV head) with some of its entries and new ones.

    Args:
        addresses: Address of each row of a table.
        part: 0 for keys, 1 for values.
        sources: The entry for each slot [rows, slots]: an old one, which is at this slot or after it, or a new one,
            counted from `num_old` on. A slot with a negative one stays as it is.
        num_old: How many old ones there are.
        new: New entries in rotated channels, float32 [rows, new, head_dim].
    """
    channels = new.shape[2]
    codes, entry, scratch = np.empty(channels, np.uint8), np.empty(channels, np.float32), np.empty(channels, np.float32)
    for row in range(len(addresses)):
        storage = _storage(carray(_pointer(addresses[row]), NUM_COLUMNS, np.int64), part)
        for slot in range(sources.shape[1]):
            source = sources[row, slot]
            if source >= num_old:
                _write(new[row, source - num_old], storage, slot, codes, scratch)
            elif source >= 0 and source != slot:
                _move(storage, source, slot, entry, codes, scratch)


@compiled
def _replace_highest(ranks, slots, rank, slot):
    """Put an entry in the place of the highest rank, which is the first of this heap; its slot is after all others."""
    place, child = 0, 1
    while child < len(ranks):
        other = child + 1
        if other < len(ranks) and (ranks[other], slots[other]) > (ranks[child], slots[child]):
            child = other
        if ranks[child] <= rank:
            break
        ranks[place], slots[place] = ranks[child], slots[child]
        place, child = child, 2 * child + 1
    ranks[place], slots[place] = rank, slot


@compiled
def _sort(slots):
    for place in range(1, len(slots)):
        slot, before = slots[place], place - 1
        while before >= 0 and slots[before] > slot:
            slots[before + 1] = slots[before]
            before -= 1
        slots[before + 1] = slot


@compiled
def _find_lowest(positions, scores, sinks, recent, ranks, slots):
    """Write the slots of as many entries as there are ranks: those that rank lowest, in ascending order.

    Of equal scores, the one in the first slot ranks lowest.
    """
    last = positions[0]
    for t in range(len(positions)):
        last = max(last, positions[t])
    for place in range(len(ranks)):
        ranks[place] = INFINITY
    for t in range(len(positions)):
        rank = scores[t] if scores[t] < HIGHEST else HIGHEST
        if positions[t] < 0:
            rank = LOWEST
        elif positions[t] < sinks or positions[t] > last - recent:
            rank = PROTECTED
        if rank < ranks[0]:
            _replace_highest(ranks, slots, rank, t)
    _sort(slots)


@compiled
def _place_centres(keys, weights, centres, offsets):
    """Write the keys of centroids with members; the others get evenly spread keys of the new entries.

    The keys and weights of the centroids come first. The offset of a centre is half of its square.
    """
    count, members, total = centres.shape[0], keys.shape[0], 0
    for member in range(count, members):
        total += weights[member] > ZERO
    for index in range(count):
        source = index
        if weights[index] <= ZERO:
            target = np.int64(np.float32(total) * ((np.float32(index) + HALF) / np.float32(count))) + 1
            source, rank = count - 1, 0
            while rank < target and source < members - 1:
                source += 1
                rank += weights[source] > ZERO
        square = ZERO
        for j in range(centres.shape[1]):
            centres[index, j] = keys[source, j]
            square += keys[source, j] * keys[source, j]
        offsets[index] = square * HALF


@compiled
def _gather_centroids(table, centroids, entries, numbers):
    """Write the entries, weights and entropies of the centroids."""
    weights = carray(_pointer(table[CENTROID_WEIGHT]), centroids, np.float32)
    entropies = carray(_pointer(table[CENTROID_ENTROPY]), centroids, np.float32)
    for index in range(centroids):
        numbers[0, index], numbers[1, index] = weights[index], entropies[index]
        for part in range(2):
            _read_dense(entries[part, index], table[CENTROID_KEY + part], 2, index)


@compiled
def _gather_evicted(table, slots, positions, scores, centroids, entries, numbers, codes):
    """Write the entries, weights and entropies of evicted entries, after those of the centroids."""
    power = _from_bits(np.int32(table[POWER]))
    for place in range(len(slots)):
        slot, member = slots[place], centroids + place
        mass = max(scores[slot], MIN_WEIGHT) ** (ONE / power) if power > ZERO else ONE
        if positions[slot] < 0:
            mass = ZERO
        numbers[0, member], numbers[1, member] = mass, mass * np.log(max(mass, MIN_WEIGHT))
        for part in range(2):
            _read(entries[part, member], _storage(table, part), slot, codes)


@compiled
def _write_centroids(table, sums, totals):
    count, channels = sums.shape[1:]
    weights = carray(_pointer(table[CENTROID_WEIGHT]), count, np.float32)
    entropies = carray(_pointer(table[CENTROID_ENTROPY]), count, np.float32)
    for index in range(count):
        weights[index], entropies[index] = totals[0, index], totals[1, index]
    for part in range(2):
        means = carray(_pointer(table[CENTROID_KEY + part]), (count, channels), np.uint16)
        for index in range(count):
            mass = max(totals[0, index], MIN_WEIGHT)
            for j in range(channels):
                means[index, j] = _to_half(min(max(sums[part, index, j] / mass, -MAX_FLOAT16), MAX_FLOAT16))


@compiled
def _nearest(key, centres, offsets, channels):
    nearest, highest = 0, LOWEST
    for index in range(len(centres)):
        closeness = -offsets[index]
        for j in range(len(channels)):
            closeness += key[j] * centres[index, j]
        if closeness > highest:
            nearest, highest = index, closeness
    return nearest


@compiled
def _move_centres(keys, weights, centres, offsets, channels):
    """Move each centre to the weighted mean of the keys that are nearest to it, if there are any."""
    sums, totals = np.zeros((len(centres), len(channels)), np.float32), np.zeros(len(centres), np.float32)
    for member in range(len(weights)):
        nearest = _nearest(keys[member], centres, offsets, channels)
        totals[nearest] += weights[member]
        for j in range(len(channels)):
            sums[nearest, j] += weights[member] * keys[member, j]
    for index in range(len(centres)):
        if totals[index] > ZERO:
            square, mass = ZERO, max(totals[index], MIN_WEIGHT)
            for j in range(len(channels)):
                centres[index, j] = sums[index, j] / mass
                square += centres[index, j] * centres[index, j]
            offsets[index] = square * HALF


@compiled
def _merge(table, entries, numbers, centroids, iterations, channels):
    """Merge new entries into the centroids, as `Centroids.merge` does.

    Args:
        table: Row of the table.
        entries: Keys and values [2, members, channels] of the centroids, and then of the new entries.
        numbers: Their weights and entropies [2, members].
        centroids: How many there are.
        iterations: Of k-means.
        channels: A tuple of as many elements as a head has channels.
    """
    centres, offsets = np.empty((centroids, len(channels)), np.float32), np.empty(centroids, np.float32)
    _place_centres(entries[0], numbers[0], centres, offsets)
    for _ in range(iterations - 1):
        _move_centres(entries[0], numbers[0], centres, offsets, channels)
    sums, totals = np.zeros((2, centroids, len(channels)), np.float32), np.zeros((2, centroids), np.float32)
    for member in range(numbers.shape[1]):
        nearest = _nearest(entries[0, member], centres, offsets, channels)
        for part in range(2):
            totals[part, nearest] += numbers[part, member]
            for j in range(len(channels)):
                sums[part, nearest, j] += numbers[0, member] * entries[part, member, j]
    _write_centroids(table, sums, totals)


@compiled
def merge_entries(addresses, weights, num_old, keys, values, iterations, channels):
    """Merge entries of each (sequence, KV head) into its centroids: old ones, and new ones that have no slot.

    Args:
        addresses: Address of each row of a table.
        weights: Weights of the old entries and then of the new ones, float32 [rows, entries]; those of weight 0 take
            no part.
        num_old: How many old ones there are.
        keys: New keys in rotated channels, float32 [rows, new, head_dim].
        values: New values likewise.
        iterations: Of k-means.
        channels: A tuple of as many elements as a head has channels.
    """
    codes = np.empty(len(channels), np.uint8)
    for row in range(len(addresses)):
        table = carray(_pointer(addresses[row]), NUM_COLUMNS, np.int64)
        centroids, members = table[CENTROIDS], table[CENTROIDS]
        for source in range(weights.shape[1]):
            members += weights[row, source] > ZERO
        entries, numbers = np.empty((2, members, len(channels)), np.float32), np.empty((2, members), np.float32)
        _gather_centroids(table, centroids, entries, numbers)
        member = centroids
        for source in range(weights.shape[1]):
            weight = weights[row, source]
            if not weight > ZERO:  # NaN included, which was not counted either
                continue
            numbers[0, member], numbers[1, member] = weight, weight * np.log(max(weight, MIN_WEIGHT))
            if source < num_old:
                for part in range(2):
                    _read(entries[part, member], _storage(table, part), source, codes)
            else:
                entries[0, member, :] = keys[row, source - num_old]
                entries[1, member, :] = values[row, source - num_old]
            member += 1
        _merge(table, entries, numbers, centroids, iterations, channels)


@compiled
def _fill_holes(table, slots, start, positions, scores, entry, codes, scratch):
    """Move the entries from `start` on, in their order: into the slots of evicted ones before it, then from it on.

    The slots of evicted entries are in ascending order.
    """
    hole, gone, target = 0, 0, start
    while gone < len(slots) and slots[gone] < start:
        gone += 1
    holes = gone
    for source in range(start, len(positions)):
        if gone < len(slots) and slots[gone] == source:
            gone += 1
            continue
        if hole < holes:
            free = slots[hole]
            hole += 1
        else:
            free = target
            target += 1
        if free == source:
            continue
        for part in range(2):
            _move(_storage(table, part), source, free, entry, codes, scratch)
        positions[free], scores[free] = positions[source], scores[source]


@compiled
def _evict_row(table, codes, entry, scratch, channels):
    """Evict the lowest scores of a (sequence, KV head), and merge these entries into its centroids.

    The entries that remain fill the first slots.
    """
    count, retained, centroids = table[FILLED], table[RETAINED], table[CENTROIDS]
    number, members = count - retained, centroids + count - retained
    positions = carray(_pointer(table[POSITIONS]), count, np.int32)
    scores = carray(_pointer(table[SCORES]), count, np.float32)
    ranks, slots = np.empty(number, np.float32), np.empty(number, np.int64)
    _find_lowest(positions, scores, table[SINK_TOKENS], table[RECENT_WINDOW], ranks, slots)
    if centroids > 0:
        entries, numbers = np.empty((2, members, len(channels)), np.float32), np.empty((2, members), np.float32)
        _gather_centroids(table, centroids, entries, numbers)
        _gather_evicted(table, slots, positions, scores, centroids, entries, numbers, codes)
        _merge(table, entries, numbers, centroids, 1, channels)
    _fill_holes(table, slots, table[RESIDUAL_START], positions, scores, entry, codes, scratch)
    table[FILLED] = retained


@compiled
def evict_layer(addresses, channels):
    """Evict the lowest scores of each (sequence, KV head), and merge these entries into its centroids.

    Args:
        addresses: Address of each row of a table.
        channels: A tuple of as many elements as a head has channels.
    """
    codes, entry = np.empty(len(channels), np.uint8), np.empty(len(channels), np.float32)
    scratch = np.empty(len(channels), np.float32)
    for row in range(len(addresses)):
        table = carray(_pointer(addresses[row]), NUM_COLUMNS, np.int64)
        _evict_row(table, codes, entry, scratch, channels)


@compiled
def _next_slot(table, position):
    """Return the slot of the next entry and the number of entries with it; a slot of -1 if it has none."""
    filled, length, sinks = table[FILLED], table[RING_LENGTH], table[SINK_TOKENS]
    slot, count = filled, filled + 1
    if length > 0:
        slot = position if position < sinks else sinks + (position - sinks) % length
        count = min(count, table[CAPACITY])
    if filled < 0 or slot >= count or count > table[SLOTS]:
        slot = -1
    return slot, count


@compiled
def _keep_probs(space, count, probs):
    for g in range(probs.shape[0]):
        for t in range(probs.shape[1]):
            probs[g, t] = space[g, t] if t < count else ZERO


@compiled
def _is_eviction_due(table):
    """Count a token of a row that is evicted here, and return whether entries have to go now."""
    if table[EVICTS] == 0:
        return False
    table[SINCE_EVICTION] += 1
    if table[SINCE_EVICTION] < table[INTERVAL]:
        return False
    table[SINCE_EVICTION] = 0
    return table[FILLED] > table[RETAINED]


@compiled
def decode_layer(
    addresses, positions, query, key, value, output, sinks, probs, scaling, softcap, channels, half, group
):
    """Store and attend to new tokens of each (sequence, KV head), one after another, in rows of all arguments.

    Args:
        addresses: Address of each row of a table.
        positions: Position of the first new token of each row.
        query: float32 [rows, tokens, group, head_dim], which is changed.
        key: float32 [rows, tokens, head_dim], which is changed.
        value: float32 [rows, tokens, head_dim], which is changed.
        output: float32 [rows, tokens, group, head_dim], which is written.
        sinks: Learned sink logits [rows, group], or of size 0.
        probs: float32 [rows, tokens, group, entries], which is written for KEEP_PROBS, or of size 0.
        scaling: Factor of the logits.
        softcap: Softcap of the logits, or 0.
        channels: A tuple of as many elements as a head has channels.
        half: A tuple of half as many.
        group: A tuple of as many elements as a KV head has query heads.

    Returns:
        The number of rows that are not done, since the table has no slot for a token.
    """
    size, tokens, refused = 0, query.shape[1], 0
    for row in range(len(addresses)):
        table = carray(_pointer(addresses[row]), NUM_COLUMNS, np.int64)
        size = max(size, min(table[FILLED] + tokens, table[SLOTS]) + table[CENTROIDS])
    codes, entry = np.empty(len(channels), np.uint8), np.empty(len(channels), np.float32)
    scratch = np.empty(len(channels), np.float32)
    space, products = np.empty((len(group), size), np.float32), np.empty((len(group), size), np.float32)
    for row in range(len(addresses)):
        table = carray(_pointer(addresses[row]), NUM_COLUMNS, np.int64)
        own_sinks = sinks[row] if sinks.size else sinks.ravel()
        for token in range(tokens):
            own, position = query[row, token], positions[row] + token
            slot, count = _next_slot(table, position)
            if slot < 0:
                refused += 1
                break
            for g in range(len(group)):
                _rotate_key(own[g], table[KEY_BLOCK], table[CHANNEL_ORDER], entry)
            _store(key[row, token], value[row, token], table, slot, position, codes, entry)
            table[FILLED], table[LAST_POSITION] = count, position
            _probs(own, table, count, own_sinks, scaling, softcap, space, products, entry, channels, half, group)
            _output(space, table, count, output[row, token], products, entry, channels, group)
            if table[UPDATE] == HEAVY_HITTER:
                _update_heavy_hitters(space, table, count, position)
            elif table[UPDATE] == KEEP_PROBS:
                _keep_probs(space, count, probs[row, token])
            if _is_eviction_due(table):
                _evict_row(table, codes, entry, scratch, channels)
    return refused
