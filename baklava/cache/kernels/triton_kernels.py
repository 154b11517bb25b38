"""Device code of `triton_decode`, in four launches: store the token, attend in splits, join the splits, score.

Bits, segments and mixed precision differ between the rows of a launch, so they are read from the table at run time.
They are the same for all threads of a program, so a branch on them costs next to nothing.

Channels are read in two halves, since the halves of a key may differ in their bits. A code is read plane by plane; a
thread shifts its field out of the byte that holds it, which up to seven neighbours read as well.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from baklava.cache import table_columns as columns
from baklava.cache.storage.quantized_codec import MAX_STRETCH

POSITIONS = tl.constexpr(columns.POSITIONS)
SCORES = tl.constexpr(columns.SCORES)
CENTROIDS = tl.constexpr(columns.CENTROIDS)
CENTROID_KEY = tl.constexpr(columns.CENTROID_KEY)
CENTROID_VALUE = tl.constexpr(columns.CENTROID_VALUE)
CENTROID_WEIGHT = tl.constexpr(columns.CENTROID_WEIGHT)
CENTROID_ENTROPY = tl.constexpr(columns.CENTROID_ENTROPY)
KEY_BLOCK = tl.constexpr(columns.KEY_BLOCK)
VALUE_BLOCK = tl.constexpr(columns.VALUE_BLOCK)
CHANNEL_ORDER = tl.constexpr(columns.CHANNEL_ORDER)
KEY = tl.constexpr(columns.KEY)
VALUE = tl.constexpr(columns.VALUE)
NUM_COLUMNS = tl.constexpr(columns.NUM_COLUMNS)

SINKS = tl.constexpr(columns.SINKS)
QUANTIZED_START = tl.constexpr(columns.QUANTIZED_START)
QUANTIZED_STOP = tl.constexpr(columns.QUANTIZED_STOP)
RECENT = tl.constexpr(columns.RECENT)
DENSE_BYTES = tl.constexpr(columns.DENSE_BYTES)
FIRST_CHANNELS = tl.constexpr(columns.FIRST_CHANNELS)
FIRST_BITS = tl.constexpr(columns.FIRST_BITS)
SECOND_BITS = tl.constexpr(columns.SECOND_BITS)

# Columns of a part of quantized entries, counted from its bits.
CODES = tl.constexpr(columns.FIRST_CODES - columns.FIRST_BITS)
SCALES = tl.constexpr(columns.FIRST_SCALES - columns.FIRST_BITS)
MEAN = tl.constexpr(columns.FIRST_MEAN - columns.FIRST_BITS)

HEAVY_HITTER = tl.constexpr(columns.HEAVY_HITTER)

MAX_SPLITS = tl.constexpr(32)
"""Programs that share the entries of a row. One number of them is compiled, whatever the lengths."""

ROTATION_CHUNK = tl.constexpr(32)
"""Channels that are rotated at a time: the signs of all of them would not fit the registers."""

MAX_FLOAT16 = tl.constexpr(65504.0)
MIN_STEP = tl.constexpr(1.1754943508222875e-38)
STRETCH = tl.constexpr(MAX_STRETCH)
MIN_WEIGHT = tl.constexpr(1e-12)
LOWEST = tl.constexpr(-3.4028234663852886e38)
ROUND_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 x 2^23: float32 has no fraction there


def jit(function: Callable[..., Any]) -> Any:
    """Make a kernel, or a function of kernels, of what may be wrapped by a type checker."""
    function = inspect.unwrap(function)
    # One variant for all lengths: otherwise a kernel would be compiled again when a number is 1 or a multiple of 16.
    changing = [name for name in ("splits", "stride", "distance") if name in inspect.signature(function).parameters]
    return triton.jit(function, do_not_specialize=changing)


@jit
def _signs(row, column, block):
    """Return the signs (1, -1, 0) of the rotation at these rows and columns; a block of 1 changes nothing."""
    bits = row & column & (block - 1)
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return tl.where(row // block == column // block, 1.0 - 2.0 * (bits & 1).to(tl.float32), 0.0)


@jit
def _scale(block):
    return tl.div_rn(1.0, tl.sqrt_rn(block.to(tl.float32)))


@jit
def _round(x):
    """Return the nearest integers, halves to even ones, as torch does."""
    return (x + ROUND_TO_INTEGER) - ROUND_TO_INTEGER


@jit
def _plane_width(bits):
    """Return the bits of the first plane of a code: those of the planes sum up to its bits."""
    return tl.where(bits >= 8, 8, tl.where(bits >= 4, 4, tl.where(bits >= 2, 2, tl.where(bits >= 1, 1, 0))))


@jit
def _write_plane(codes, address, first, channels, width, shift, padded: tl.constexpr):
    """Pack one plane of the codes of channels `first` to `first + channels`: places of each byte are rows of a sum."""
    size = channels * width // 8
    index = tl.arange(0, 8 * padded)
    place, byte = index // padded, index % padded
    used = (place * width < 8) & (byte < size)
    fields = tl.gather(codes, tl.where(used, first + place * size + byte, 0), 0)
    fields = ((fields >> shift) & ((1 << width) - 1)) << tl.where(used, place * width, 0)
    packed = tl.sum(tl.reshape(tl.where(used, fields, 0), [8, padded]), 0)
    byte = tl.arange(0, padded)
    tl.store((address + byte).to(tl.pointer_type(tl.uint8)), packed.to(tl.uint8), mask=byte < size)


@jit
def _write_quantized(x, first, channels, part, slot, step_sizes, dense: tl.constexpr, padded: tl.constexpr):
    """Quantize channels `first` to `first + channels` of an entry into a slot."""
    bits = tl.load(part).to(tl.int32)
    mean = tl.load(part + MEAN)
    channel = tl.arange(0, padded)
    own = (channel >= first) & (channel < first + channels)
    x -= tl.load(mean.to(tl.pointer_type(dense)) + (channel - first), mask=own & (mean != 0), other=0.0).to(tl.float32)
    x = tl.where(own, x, 0.0)
    half = ((1 << bits) - 1).to(tl.float32) * 0.5
    squares = tl.sum(x * x, 0)
    step = tl.sqrt_rn(tl.div_rn(squares, channels.to(tl.float32))) * tl.load(step_sizes + bits)
    step = tl.maximum(tl.minimum(step, tl.div_rn(tl.max(tl.abs(x), 0), half)), MIN_STEP)
    numbers = tl.minimum(tl.maximum(_round(tl.div_rn(x, step) + half), 0.0), 2.0 * half)
    levels = tl.where(own, numbers - half, 0.0)
    products = tl.sum(x * levels, 0)
    longest = STRETCH * tl.div_rn(products, tl.sum(levels * levels, 0))
    scale = tl.minimum(tl.minimum(tl.div_rn(squares, tl.maximum(products, MIN_STEP)), longest), MAX_FLOAT16)
    tl.store(tl.load(part + SCALES).to(tl.pointer_type(tl.float16)) + slot, scale.to(tl.float16))
    codes = numbers.to(tl.int32)
    address = tl.load(part + CODES) + slot * (channels * bits // 8)
    shift = bits * 0
    for _ in tl.static_range(3):
        width = _plane_width(bits - shift)
        if width > 0:
            _write_plane(codes, address, first, channels, width, shift, padded)
        address += channels * width // 8
        shift += width


@jit
def _write(x, storage, slot, step_sizes, head_dim: tl.constexpr, dense: tl.constexpr, padded: tl.constexpr):
    """Write one rotated entry into a slot."""
    start, stop = tl.load(storage + QUANTIZED_START), tl.load(storage + QUANTIZED_STOP)
    if (slot >= start) & (slot < stop):
        first = tl.load(storage + FIRST_CHANNELS).to(tl.int32)
        _write_quantized(x, first * 0, first, storage + FIRST_BITS, slot - start, step_sizes, dense, padded)
        if first < head_dim:
            rest = head_dim - first
            _write_quantized(x, first, rest, storage + SECOND_BITS, slot - start, step_sizes, dense, padded)
    else:
        address = tl.where(slot < start, tl.load(storage + SINKS), tl.load(storage + RECENT))
        at = tl.where(slot < start, slot, slot - stop) * head_dim + tl.arange(0, padded)
        inside = tl.arange(0, padded) < head_dim
        if tl.load(storage + DENSE_BYTES) == 4:
            tl.store(address.to(tl.pointer_type(tl.float32)) + at, x, mask=inside)
        else:
            tl.store(address.to(tl.pointer_type(dense)) + at, x.to(dense), mask=inside)


@jit
def store_token(
    tables,
    slots,
    positions,
    query,
    key,
    value,
    rotated,
    step_sizes,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    padded: tl.constexpr,
    dense: tl.constexpr,
):
    """Rotate a query, the key or the value of a row, and store the key and the value. Grid: rows, group + 2."""
    row, vector = tl.program_id(0).to(tl.int64), tl.program_id(1)
    table = tables + row * NUM_COLUMNS
    is_value = vector == group + 1
    block = tl.maximum(tl.where(is_value, tl.load(table + VALUE_BLOCK), tl.load(table + KEY_BLOCK)), 1).to(tl.int32)
    order = tl.where(is_value, 0, tl.load(table + CHANNEL_ORDER))
    channel = tl.arange(0, padded)
    x = tl.full([padded], 0.0, tl.float32)
    for first in range(0, head_dim, ROTATION_CHUNK):
        source = first + tl.arange(0, ROTATION_CHUNK)
        at = tl.load(order.to(tl.pointer_type(tl.int64)) + source, mask=(source < head_dim) & (order != 0), other=0)
        at = tl.where(order != 0, at, source)
        inside = source < head_dim
        part = tl.load(query + (row * group + vector) * head_dim + at, mask=inside & (vector < group), other=0.0)
        part = part.to(tl.float32)
        part += tl.load(key + row * head_dim + at, mask=inside & (vector == group), other=0.0).to(tl.float32)
        part += tl.load(value + row * head_dim + at, mask=inside & is_value, other=0.0).to(tl.float32)
        x += tl.sum(part[:, None] * _signs(source[:, None], channel[None, :], block), 0)
    x *= _scale(block)
    x = tl.where(channel < head_dim, x, 0.0)
    tl.store(rotated + (row * (group + 2) + vector) * head_dim + channel, x, mask=channel < head_dim)
    if vector >= group:
        slot = tl.load(slots + row)
        storage = table + tl.where(is_value, VALUE, KEY)
        _write(x, storage, slot, step_sizes, head_dim, dense, padded)
        state = tl.load(table + POSITIONS)
        has_state = (state != 0) & is_value
        tl.store(state.to(tl.pointer_type(tl.int32)) + slot, tl.load(positions + row).to(tl.int32), mask=has_state)
        tl.store(tl.load(table + SCORES).to(tl.pointer_type(tl.float32)) + slot, 0.0, mask=has_state)


@jit
def _share(count, splits, block: tl.constexpr):
    """Return the entries of each split: the same for all but the last ones, in whole blocks."""
    return ((count + splits * block - 1) // (splits * block)) * block


@jit
def _read_plane(address, size, lane, channels, width, mask):
    """Return the fields of one plane; `size` has the bytes of an entry, of which the first starts at the address."""
    entry, plane = tl.arange(0, mask.shape[0]), channels * width // 8
    at = address.to(tl.pointer_type(tl.uint8)) + ((entry * size)[:, None] + (lane % plane)[None, :])
    fields = tl.load(at, mask=mask, other=0).to(tl.int32) >> ((lane // plane) * width)[None, :]
    return fields & ((1 << width) - 1)


@jit
def _read_codes(bits, address, channels, lane, mask):
    """Return the codes [entries, lanes] at these channels, of a part that has so many channels."""
    size = channels * bits // 8
    width = _plane_width(bits)
    code = _read_plane(address, size, lane, channels, width, mask)
    if bits > width:
        address += channels * width // 8
        second = _plane_width(bits - width)
        code |= _read_plane(address, size, lane, channels, second, mask) << width
        shift = width + second
        if bits > shift:
            address += channels * second // 8
            code |= _read_plane(address, size, lane, channels, bits - shift, mask) << shift
    return code


@jit
def _read_dense(address, itemsize, lane, mask, head_dim: tl.constexpr, dense: tl.constexpr, number: tl.constexpr):
    """Return dense entries [entries, lanes] at these channels; the first entry starts at the address."""
    at = (tl.arange(0, mask.shape[0]) * head_dim)[:, None] + lane[None, :]
    if itemsize == 4:
        entries = tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0).to(number)
    else:
        entries = tl.load(address.to(tl.pointer_type(dense)) + at, mask=mask, other=0.0).to(number)
    return entries


@jit
def _parts(storage, lane, head_dim: tl.constexpr):
    """Return the channels of a part, those of the second half in its part, and the parts of both halves.

    Both halves are in one part if all channels have the same bits.
    """
    channels = tl.load(storage + FIRST_CHANNELS).to(tl.int32)
    is_split = channels < head_dim
    second_channel = lane + tl.where(is_split, 0, head_dim // 2)
    second = storage + tl.where(is_split, SECOND_BITS, FIRST_BITS)
    return channels, second_channel, storage + FIRST_BITS, second


@jit
def _product(rows, entries):
    return tl.dot(rows, tl.trans(entries), input_precision="ieee")


@jit
def _dense_logits(queries, address, itemsize, lane, mask, head_dim: tl.constexpr, dense: tl.constexpr):
    """Return the products of both halves of the queries with dense entries."""
    number: tl.constexpr = queries[0].dtype
    scores = _product(queries[0], _read_dense(address, itemsize, lane, mask, head_dim, dense, number))
    lane += head_dim // 2
    return scores + _product(queries[1], _read_dense(address, itemsize, lane, mask, head_dim, dense, number))


@jit
def _add_dense(sums, weights, address, itemsize, lane, mask, head_dim: tl.constexpr, dense: tl.constexpr):
    """Add dense values, weighted, to the sums of both halves."""
    first_sum, second_sum = sums
    number: tl.constexpr = weights.dtype
    entries = _read_dense(address, itemsize, lane, mask, head_dim, dense, number)
    first_sum += tl.dot(weights, entries, input_precision="ieee")
    entries = _read_dense(address, itemsize, lane + head_dim // 2, mask, head_dim, dense, number)
    return first_sum, second_sum + tl.dot(weights, entries, input_precision="ieee")


@jit
def _middle(bits):
    """Return the mid-point of codes."""
    return ((1 << bits) - 1).to(tl.float32) * 0.5


@jit
def _query_sums(query, part, channel, inside, dense: tl.constexpr):
    """Return the products of the queries with the mid-point of the codes and with the mean, at these channels."""
    mean, query = tl.load(part + MEAN), query.to(tl.float32)
    means = tl.load(mean.to(tl.pointer_type(dense)) + channel, mask=inside & (mean != 0), other=0.0).to(tl.float32)
    return tl.sum(query, 1) * _middle(tl.load(part).to(tl.int32)), tl.sum(query * means[None, :], 1)


@jit
def _read_part(part, channels, channel, inside, start, is_coded, number: tl.constexpr):
    """Return the codes [entries, lanes] of a part at these channels, from entry `start` on, and their scales."""
    bits = tl.load(part).to(tl.int32)
    address = tl.load(part + CODES) + start * (channels * bits // 8)
    codes = _read_codes(bits, address, channels, channel, is_coded[:, None] & inside[None, :])
    scales = tl.load(part + SCALES).to(tl.pointer_type(tl.float16)) + start
    scale = tl.load(scales + tl.arange(0, is_coded.shape[0]), mask=is_coded, other=0.0)
    return codes.to(tl.float32).to(number), scale.to(tl.float32)


@jit
def _quantized_logits(query, middle, part, channels, channel, inside, start, is_coded):
    """Return the products of the queries with quantized entries, without their mean."""
    codes, scale = _read_part(part, channels, channel, inside, start, is_coded, query.dtype)
    return (_product(query, codes) - middle[:, None]) * scale[None, :]


@jit
def _add_quantized(output, probs, part, channels, channel, inside, start, is_coded, number: tl.constexpr):
    """Add quantized values, weighted by their probabilities."""
    codes, scale = _read_part(part, channels, channel, inside, start, is_coded, number)
    # The sum is of the weights as they are multiplied, so their rounding cancels out.
    weights = (probs * scale[None, :]).to(number)
    middle = tl.sum(weights.to(tl.float32), 1) * _middle(tl.load(part).to(tl.int32))
    return output + tl.dot(weights, codes, input_precision="ieee") - middle[:, None]


@jit
def _apply_softcap(logits, softcap):
    if softcap > 0:
        shrunk = tl.exp(-2.0 * tl.abs(logits) / softcap)
        tanh = (1.0 - shrunk) / (1.0 + shrunk)
        logits = tl.where(logits < 0, -tanh, tanh) * softcap
    return logits


@jit
def _add_to_softmax(scores, largest, total, sums):
    """Return the exponentials of more logits, and the state of the softmax as it is before their values are added."""
    before, largest = largest, tl.maximum(largest, tl.max(scores, 1))
    shrink, probs = tl.exp(before - largest), tl.exp(scores - largest[:, None])
    return probs, largest, total * shrink + tl.sum(probs, 1), (sums[0] * shrink[:, None], sums[1] * shrink[:, None])


@jit
def _bounds(storage, start, filled, block: tl.constexpr):
    """Return where the quantized entries of a block start and stop, within its filled ones."""
    begin = tl.minimum(tl.maximum(tl.load(storage + QUANTIZED_START) - start, 0), filled)
    stop = tl.minimum(tl.maximum(tl.load(storage + QUANTIZED_STOP) - start, 0), filled)
    return begin.to(tl.int32), stop.to(tl.int32)


@jit
def _prepare_codes(queries, keys, lane, inside, head_dim: tl.constexpr, dense: tl.constexpr):
    """Return what all blocks of quantized keys need: their parts, and products of the queries with no entry."""
    channels, second_channel, first_part, second_part = _parts(keys, lane, head_dim)
    first_middle, first_mean = _query_sums(queries[0], first_part, lane, inside, dense)
    second_middle, second_mean = _query_sums(queries[1], second_part, second_channel, inside, dense)
    return channels, second_channel, first_part, second_part, first_middle, second_middle, first_mean + second_mean


@jit
def _block_logits(
    queries,
    coded,
    keys,
    itemsize,
    start,
    filled,
    lane,
    inside,
    head_dim: tl.constexpr,
    dense: tl.constexpr,
    block: tl.constexpr,
):
    """Return the products of the queries with the filled entries from `start` on."""
    channels, second_channel, first_part, second_part, first_middle, second_middle, mean = coded
    entry = tl.arange(0, block)
    scores = tl.full([queries[0].shape[0], block], 0.0, tl.float32)
    first, stop = _bounds(keys, start, filled, block)
    if first > 0:
        address = tl.load(keys + SINKS) + start * (head_dim * itemsize)
        mask = (entry < first)[:, None] & inside[None, :]
        scores += _dense_logits(queries, address, itemsize, lane, mask, head_dim, dense)
    if stop > first:
        is_coded, own = (entry >= first) & (entry < stop), start - tl.load(keys + QUANTIZED_START)
        products = _quantized_logits(queries[0], first_middle, first_part, channels, lane, inside, own, is_coded)
        products += _quantized_logits(
            queries[1], second_middle, second_part, channels, second_channel, inside, own, is_coded
        )
        scores = tl.where(is_coded[None, :], products + mean[:, None], scores)
    if filled > stop:
        own = start - tl.load(keys + QUANTIZED_STOP)
        address = tl.load(keys + RECENT) + own * (head_dim * itemsize)
        mask = ((entry >= stop) & (entry < filled))[:, None] & inside[None, :]
        scores += _dense_logits(queries, address, itemsize, lane, mask, head_dim, dense)
    return scores


@jit
def _add_block_values(
    output,
    probs,
    values,
    itemsize,
    start,
    filled,
    lane,
    inside,
    head_dim: tl.constexpr,
    dense: tl.constexpr,
    number: tl.constexpr,
    block: tl.constexpr,
):
    """Add the values of the filled entries from `start` on, weighted by their probabilities."""
    entry, weights, part = tl.arange(0, block), probs.to(number), values + FIRST_BITS
    first, stop = _bounds(values, start, filled, block)
    if first > 0:
        address = tl.load(values + SINKS) + start * (head_dim * itemsize)
        mask = (entry < first)[:, None] & inside[None, :]
        output = _add_dense(output, weights, address, itemsize, lane, mask, head_dim, dense)
    if stop > first:
        is_coded, own = (entry >= first) & (entry < stop), start - tl.load(values + QUANTIZED_START)
        first_sum = _add_quantized(output[0], probs, part, head_dim, lane, inside, own, is_coded, number)
        lane_of_second = head_dim // 2 + lane
        second_sum = _add_quantized(output[1], probs, part, head_dim, lane_of_second, inside, own, is_coded, number)
        output = (first_sum, second_sum)
    if filled > stop:
        own = start - tl.load(values + QUANTIZED_STOP)
        address = tl.load(values + RECENT) + own * (head_dim * itemsize)
        mask = ((entry >= stop) & (entry < filled))[:, None] & inside[None, :]
        output = _add_dense(output, weights, address, itemsize, lane, mask, head_dim, dense)
    return output


@jit
def attend_split(
    tables,
    counts,
    rotated,
    logits,
    stats,
    sums,
    scaling,
    softcap,
    splits,
    stride,
    group: tl.constexpr,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    lanes: tl.constexpr,
    block: tl.constexpr,
    keeps_logits: tl.constexpr,
    dense: tl.constexpr,
    number: tl.constexpr,
):
    """Attend to one of the splits of a row's entries; the first has the centroids as well. Grid: rows, splits.

    Args:
        tables: Addresses and formats.
        counts: Entries of each row.
        rotated: Rotated queries, as `store_token` writes them.
        logits: float32 [rows, group, stride], which is written if `keeps_logits`.
        stats: float32 [rows, splits, 2, group]: maximum, and sum of exponentials.
        sums: float32 [rows, splits, group, head_dim]: values weighted by exponentials.
        scaling: Factor of the logits.
        softcap: Softcap of the logits, or 0.
        splits: Number of splits.
        stride: Entries of `logits`.
        group: Query heads of a KV head.
        heads: The same, padded.
        head_dim: Channels of a head.
        lanes: Half of them, padded.
        block: Entries that are read at a time.
        keeps_logits: Whether the logits are written.
        dense: Type of dense entries with two bytes.
        number: Type of the factors of products.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    table = tables + row * NUM_COLUMNS
    keys, values = table + KEY, table + VALUE
    count = tl.load(counts + row)
    share = _share(count, splits, block)
    begin = split * share
    end = tl.minimum(begin + share, count)

    half: tl.constexpr = head_dim // 2
    head, lane, entry = tl.arange(0, heads), tl.arange(0, lanes), tl.arange(0, block)
    inside = lane < half
    both = (head < group)[:, None] & inside[None, :]
    at = rotated + (row * (group + 2) + head[:, None]) * head_dim + lane[None, :]
    queries = (tl.load(at, mask=both, other=0.0).to(number), tl.load(at + half, mask=both, other=0.0).to(number))
    key_bytes, value_bytes = tl.load(keys + DENSE_BYTES).to(tl.int32), tl.load(values + DENSE_BYTES).to(tl.int32)
    coded = _prepare_codes(queries, keys, lane, inside, head_dim, dense)

    largest = tl.full([heads], float("-inf"), tl.float32)
    total = tl.full([heads], 0.0, tl.float32)
    output = (tl.full([heads, lanes], 0.0, tl.float32), tl.full([heads, lanes], 0.0, tl.float32))
    for start in range(begin, end, block):
        filled = tl.minimum(end - start, block).to(tl.int32)
        scores = _block_logits(queries, coded, keys, key_bytes, start, filled, lane, inside, head_dim, dense, block)
        scores = _apply_softcap(scores * scaling, softcap)
        if keeps_logits:
            to = logits + (row * group + head[:, None]) * stride + (start + entry[None, :])
            tl.store(to, scores, mask=(head < group)[:, None] & (entry < filled)[None, :])
        scores = tl.where((entry < filled)[None, :], scores, float("-inf"))
        probs, largest, total, output = _add_to_softmax(scores, largest, total, output)
        output = _add_block_values(
            output, probs, values, value_bytes, start, filled, lane, inside, head_dim, dense, number, block
        )

    centroids = tl.where(split == 0, tl.load(table + CENTROIDS), 0)
    for start in range(0, centroids, block):
        is_filled = entry < centroids - start
        mask = is_filled[:, None] & inside[None, :]
        address = tl.load(table + CENTROID_KEY) + start * (2 * head_dim)
        scores = _dense_logits(queries, address, 2, lane, mask, head_dim, tl.float16)
        scores = _apply_softcap(scores * scaling, softcap) + _centroid_bias(table, start + entry, is_filled)[None, :]
        scores = tl.where(is_filled[None, :], tl.maximum(scores, LOWEST), float("-inf"))
        probs, largest, total, output = _add_to_softmax(scores, largest, total, output)
        address = tl.load(table + CENTROID_VALUE) + start * (2 * head_dim)
        output = _add_dense(output, probs.to(number), address, 2, lane, mask, head_dim, tl.float16)

    is_used = (head < group) & (begin < end)
    at = stats + (row * splits + split) * (2 * group) + head
    tl.store(at, largest, mask=is_used)
    tl.store(at + group, total, mask=is_used)
    to = sums + ((row * splits + split) * group + head[:, None]) * head_dim + lane[None, :]
    tl.store(to, output[0], mask=is_used[:, None] & inside[None, :])
    tl.store(to + half, output[1], mask=is_used[:, None] & inside[None, :])


@jit
def _centroid_bias(table, slot, filled):
    weight = tl.load(tl.load(table + CENTROID_WEIGHT).to(tl.pointer_type(tl.float32)) + slot, mask=filled, other=0.0)
    entropy = tl.load(tl.load(table + CENTROID_ENTROPY).to(tl.pointer_type(tl.float32)) + slot, mask=filled, other=0.0)
    at_least = tl.maximum(weight, MIN_WEIGHT)
    return tl.where(weight > 0, tl.log(at_least) - entropy / at_least, LOWEST)


@jit
def join_splits(
    tables,
    counts,
    stats,
    sums,
    sinks,
    output,
    totals,
    splits,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
    has_sinks: tl.constexpr,
):
    """Write the output of a query head, and the maximum and the sum of its softmax to `totals`. Grid: rows, group."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, channel = tl.arange(0, MAX_SPLITS), tl.arange(0, padded)
    count = tl.load(counts + row)
    is_used = (split < splits) & (split * _share(count, splits, block) < count)
    at = stats + (row * splits + split) * (2 * group) + head
    maxima = tl.load(at, mask=is_used, other=float("-inf"))
    largest = tl.max(maxima, 0)
    if has_sinks:
        sink = tl.load(sinks + row * group + head).to(tl.float32)
        largest = tl.maximum(largest, sink)
    factor = tl.exp(maxima - largest)
    total = tl.sum(tl.load(at + group, mask=is_used, other=0.0) * factor, 0)
    if has_sinks:
        total += tl.exp(sink - largest)
    at = sums + ((row * splits + split[:, None]) * group + head) * head_dim + channel[None, :]
    parts = tl.load(at, mask=is_used[:, None] & (channel < head_dim)[None, :], other=0.0)
    x = tl.sum(parts * factor[:, None], 0) / total
    block_size = tl.maximum(tl.load(tables + row * NUM_COLUMNS + VALUE_BLOCK), 1).to(tl.int32)
    x *= _scale(block_size)
    for first in range(0, head_dim, ROTATION_CHUNK):
        column = first + tl.arange(0, ROTATION_CHUNK)
        part = tl.sum(x[:, None] * _signs(channel[:, None], column[None, :], block_size), 0)
        tl.store(output + (row * group + head) * head_dim + column, part, mask=column < head_dim)
    tl.store(totals + (row * group + head) * 2, largest)
    tl.store(totals + (row * group + head) * 2 + 1, total)


@jit
def use_probs(
    tables,
    counts,
    positions,
    logits,
    totals,
    stride,
    distance,
    group: tl.constexpr,
    heads: tl.constexpr,
    block: tl.constexpr,
    update: tl.constexpr,
    squared: tl.constexpr,
    by_max: tl.constexpr,
):
    """Replace logits by probabilities, or update the scores of heavy hitters by them. Grid: rows, blocks of entries."""
    row, head = tl.program_id(0).to(tl.int64), tl.arange(0, heads)
    slot = tl.program_id(1) * block + tl.arange(0, block)
    filled, is_head = slot < tl.load(counts + row), head < group
    both = is_head[:, None] & filled[None, :]
    at = logits + (row * group + head[:, None]) * stride + slot[None, :]
    largest = tl.load(totals + (row * group + head) * 2, mask=is_head, other=0.0)
    sums = tl.load(totals + (row * group + head) * 2 + 1, mask=is_head, other=1.0)
    probs = tl.exp(tl.load(at, mask=both, other=float("-inf")) - largest[:, None]) / sums[:, None]
    if update == HEAVY_HITTER:
        attention = tl.max(probs, 0) if by_max else tl.sum(probs, 0) / group
        if squared:
            attention *= attention
        table = tables + row * NUM_COLUMNS
        entry = tl.load(table + POSITIONS).to(tl.pointer_type(tl.int32)) + slot
        score = tl.load(table + SCORES).to(tl.pointer_type(tl.float32)) + slot
        filled &= tl.load(table + SCORES) != 0
        distances = tl.load(positions + row).to(tl.int32) - tl.load(entry, mask=filled, other=0)
        is_counted = filled & (distances >= distance)
        queries = tl.maximum(distances - distance, 0).to(tl.float32)
        total = tl.load(score, mask=is_counted, other=0.0) * queries + attention
        tl.store(score, total / (queries + 1.0), mask=is_counted)
    else:
        tl.store(at, probs, mask=both)
