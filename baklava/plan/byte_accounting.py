"""How many bits each channel of a stored key or value takes, and the bytes that caches of a geometry take."""

from typing import Literal

from baklava.plan.geometry import CacheGeometry

BitSplit = tuple[tuple[int, int], ...]
"""How the channels of a key or value are stored: pairs of (number of channels, bits), the most important first."""

DenseBits = Literal[32, 16]

FULL_BITS = 16
"""Bits of an element of the full cache that a ratio refers to."""

SCALE_BYTES = 2
"""Bytes of the float16 scale of a quantized key or value, or of each part of it that has its own bits."""

MIXED_PRECISION_BELOW_BITS = 8
"""Keys in fewer bits than this are stored in mixed precision if the order of their channels is known."""


def supports_mixed_precision(head_dim: int) -> bool:
    """Return whether the channels of a key can be stored as two halves, and named in two hexadecimal digits.

    Halves that are rotated in blocks of fewer than 16 channels lose more than mixed precision gains (8, at 112
    channels: twice the error of one precision).
    """
    return head_dim % 32 == 0 and head_dim <= 256


def bit_split(head_dim: int, bits: int, mixed_precision: bool) -> BitSplit:
    """Return how a quantized key or value of `bits` per channel divides them among its channels.

    In mixed precision the more important half takes one bit more and the other one bit less, if half of the channels
    fill whole bytes and no channel needs more than 8 bits.
    """
    half = head_dim // 2
    if mixed_precision and bits < MIXED_PRECISION_BELOW_BITS and supports_mixed_precision(head_dim):
        return ((half, bits + 1), (half, bits - 1))
    return ((head_dim, bits),)


def tensor_bytes(tokens: int, split: BitSplit, dense: int) -> int:
    """Return the bytes of the keys, or of the values, of one KV head.

    Args:
        tokens: number of entries.
        split: bits of the channels of each entry.
        dense: number of entries among `tokens` that stay in 16 bits although the others are quantized.
    """
    head_dim = sum(channels for channels, _ in split)
    if split[0][1] >= FULL_BITS:
        return tokens * head_dim * split[0][1] // 8
    packed = sum(channels * bits // 8 + SCALE_BYTES for channels, bits in split)
    return dense * head_dim * FULL_BITS // 8 + (tokens - dense) * packed


def full_cache_bytes(geometry: CacheGeometry, context_length: int) -> int:
    """Return the bytes of the full 16-bit cache of one sequence; sliding layers count the tokens in their window."""
    entries = len(geometry.full_attention_layers) * geometry.kv_heads * context_length
    payload = entries * 2 * geometry.head_dim * FULL_BITS // 8
    return payload + sliding_window_bytes(geometry, FULL_BITS, context_length)


def sliding_window_bytes(geometry: CacheGeometry, bits: int, max_tokens: int | None = None) -> int:
    """Return the bytes of the sliding layers of one sequence of at most `max_tokens` (None: of any length)."""
    windows = [window for window in geometry.windows if window is not None]
    entries = sum(window if max_tokens is None else min(window, max_tokens) for window in windows)
    return entries * geometry.kv_heads * 2 * geometry.head_dim * bits // 8
