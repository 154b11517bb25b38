"""One decode step of one layer as one compiled function: all sequences and KV heads, over entries where they lie.

It stores the new token of each (sequence, KV head), attends, and updates the scores of heavy hitters. Rotations, codes
and scores are those of `baklava.cache.storage` and `baklava.eviction`, which are the reference in the tests.

A code lies in planes of 4, 2 and 1 bits (`baklava.cache.storage.quantized_codec.pack`). LLVM makes vectors of a loop
only if its length is a constant, if it is no shorter than a vector, and if few pointers may overlap. So numbers are the
lengths of tuples, which are constants of a compiled function, and the loop over the channels of an entry is written out
per plane and query head. It takes 8 to 25 ns per entry, where general loops take 50 to 100 ns.

All of it is in one file, since numba compiles again only if the file of a function has changed. The two tables of
`quantized_codec` are an exception: after a change there, remove `__pycache__` here.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from baklava.cache.kernels.table_columns import (
    CENTROID_ENTROPY,
    CENTROID_KEY,
    CENTROID_VALUE,
    CENTROID_WEIGHT,
    CENTROIDS,
    CHANNEL_ORDER,
    DENSE_BYTES,
    FIRST_BITS,
    FIRST_CHANNELS,
    FIRST_CODES,
    FIRST_MEAN,
    FIRST_SCALES,
    HEAVY_HITTER,
    KEEP_PROBS,
    KEY,
    KEY_BLOCK,
    POSITIONS,
    QUANTIZED_START,
    QUANTIZED_STOP,
    RECENT,
    SCORES,
    SECOND_BITS,
    SECOND_CODES,
    SECOND_MEAN,
    SECOND_SCALES,
    SINKS,
    VALUE,
    VALUE_BLOCK,
)
from baklava.cache.storage.quantized_codec import NORMAL_STEP_SIZES, PLANE_WIDTHS

PLANES = np.array([(0, 0, 0), *((*PLANE_WIDTHS[bits], 0, 0)[:3] for bits in range(1, 9))], np.int64)
STEP_SIZES = np.array([0, *(NORMAL_STEP_SIZES[bits] for bits in range(1, 9))], np.float32)
MAX_FLOAT16 = np.float32(65504.0)
MIN_STEP = np.float32(np.finfo(np.float32).tiny)
MIN_WEIGHT = np.float32(1e-12)
ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
LOWEST = np.float32(np.finfo(np.float32).min)

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


@compiled
def _exp(x):
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
def _write_quantized(x, first, channels, bits, codes_address, scales_address, mean_address, slot, codes, scratch):
    """Quantize channels `first` to `first + channels` of an entry into a slot."""
    squares, largest = ZERO, ZERO
    for j in range(channels):
        scratch[j] = x[first + j]
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
    packed = carray(_pointer(codes_address), (slot + 1) * size, np.uint8)
    _pack(codes, bits, channels, packed, slot * size)
    scales = carray(_pointer(scales_address), slot + 1, np.uint16)
    scales[slot] = _to_half(min(products / levels, MAX_FLOAT16))


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
def _write(x, table, slot, codes, scratch):
    """Write one rotated entry into a slot."""
    if slot < table[QUANTIZED_START]:
        _write_dense(x, table[SINKS], table[DENSE_BYTES], slot)
        return
    if slot >= table[QUANTIZED_STOP]:
        _write_dense(x, table[RECENT], table[DENSE_BYTES], slot - table[QUANTIZED_STOP])
        return
    slot -= table[QUANTIZED_START]
    first = table[FIRST_CHANNELS]
    _write_quantized(
        x, 0, first, table[FIRST_BITS], table[FIRST_CODES], table[FIRST_SCALES], table[FIRST_MEAN], slot, codes, scratch
    )
    if first < x.shape[0]:
        _write_quantized(
            x,
            first,
            x.shape[0] - first,
            table[SECOND_BITS],
            table[SECOND_CODES],
            table[SECOND_SCALES],
            table[SECOND_MEAN],
            slot,
            codes,
            scratch,
        )


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
def _quantized_logits(
    query, bits, codes_address, scales_address, mean_address, count, scaling, logits, products, channels, group
):
    """Add the logits that these channels give to the first `count` quantized entries."""
    half = np.float32((1 << bits) - 1) * HALF
    packed = carray(_pointer(codes_address), (count, len(channels) * bits // 8), np.uint8)
    scales = carray(_pointer(scales_address), count, np.uint16)
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
            _quantized_logits(
                query,
                table[FIRST_BITS],
                table[FIRST_CODES],
                table[FIRST_SCALES],
                table[FIRST_MEAN],
                end - begin,
                scaling,
                own,
                products,
                channels,
                group,
            )
        else:
            _quantized_logits(
                query[:, : len(half)].copy(),
                table[FIRST_BITS],
                table[FIRST_CODES],
                table[FIRST_SCALES],
                table[FIRST_MEAN],
                end - begin,
                scaling,
                own,
                products,
                half,
                group,
            )
            _quantized_logits(
                query[:, len(half) :].copy(),
                table[SECOND_BITS],
                table[SECOND_CODES],
                table[SECOND_SCALES],
                table[SECOND_MEAN],
                end - begin,
                scaling,
                own,
                products,
                half,
                group,
            )
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
        logits[t] = _exp(logits[t] - largest)
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
def _update_heavy_hitters(probs, table, count, position, distance, squared, by_max):
    """Update running means of the attention that entries get from queries at least `distance` after them."""
    group = probs.shape[0]
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
    _write(key, table[KEY:VALUE], slot, codes, entry)
    _write(value, table[VALUE:], slot, codes, entry)
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
def decode_layer(
    tables,
    slots,
    counts,
    positions,
    query,
    key,
    value,
    output,
    sinks,
    probs,
    scaling,
    softcap,
    update,
    distance,
    squared,
    by_max,
    channels,
    half,
    group,
):
    """Store and attend to one new token of each (sequence, KV head), in rows of all arguments.

    Args:
        tables: Addresses and formats, by `columns`.
        slots: Slot of the new entry.
        counts: Entries with the new one.
        positions: Position of the new token.
        query: float32 [rows, group, head_dim], which is changed.
        key: float32 [rows, head_dim], which is changed.
        value: float32 [rows, head_dim], which is changed.
        output: float32 [rows, group, head_dim], which is written.
        sinks: Learned sink logits [rows, group], or of size 0.
        probs: float32 [rows, group, entries], which is written for KEEP_PROBS, or of size 0.
        scaling: Factor of the logits.
        softcap: Softcap of the logits, or 0.
        update: What becomes of the probabilities: NO_UPDATE, HEAVY_HITTER, or KEEP_PROBS to write them to `probs`.
        distance: As in HeavyHitter.
        squared: Whether its power is 2.
        by_max: Whether its reduction is "max".
        channels: A tuple of as many elements as a head has channels.
        half: A tuple of half as many.
        group: A tuple of as many elements as a KV head has query heads.
    """
    size = (counts + tables[:, CENTROIDS]).max() if counts.size else 0
    codes, entry = np.empty(len(channels), np.uint8), np.empty(len(channels), np.float32)
    space, products = np.empty((len(group), size), np.float32), np.empty((len(group), size), np.float32)
    for row in range(tables.shape[0]):
        table, count, own = tables[row], counts[row], output[row]
        for g in range(len(group)):
            _rotate_key(query[row, g], table[KEY_BLOCK], table[CHANNEL_ORDER], entry)
        _store(key[row], value[row], table, slots[row], positions[row], codes, entry)
        own_sinks = sinks[row] if sinks.size else sinks.ravel()
        _probs(query[row], table, count, own_sinks, scaling, softcap, space, products, entry, channels, half, group)
        _output(space, table, count, own, products, entry, channels, group)
        if update == HEAVY_HITTER:
            _update_heavy_hitters(space, table, count, positions[row], distance, squared, by_max)
        elif update == KEEP_PROBS:
            for g in range(len(group)):
                for t in range(count):
                    probs[row, g, t] = space[g, t]
