"""How the bits of a packed key or value are dealt to its channels."""

from typing import Literal

from baklava.plan.geometry import CacheGeometry

BitSplit = tuple[tuple[int, int], ...]
"""Channels of a key or value and the bits that they are coded in, one pair after another."""


MIXED_PRECISION_BELOW_BITS = 8
"""Bits of a key below which its channels are graded."""


def supports_mixed_precision(head_dim: int) -> bool:
    """Whether the channels of a key can be coded in two halves, and named in two hexadecimal digits.

    Halves that are rotated in blocks of fewer than 16 channels lose more than grading gains (8, at 112 channels: twice
    the error of plain codes).
    """
    return head_dim % 32 == 0 and head_dim <= 256


def bit_split(head_dim: int, bits: int, mixed_precision: bool) -> BitSplit:
    """How the bits of a packed entry are dealt to its channels, the most important ones first.

    The better half gets one more, the other one less, where that fills whole bytes and nothing takes more than 8.
    """
    half = head_dim // 2
    if mixed_precision and bits < MIXED_PRECISION_BELOW_BITS and supports_mixed_precision(head_dim):
        return ((half, bits + 1), (half, bits - 1))
    return ((head_dim, bits),)


DenseBits = Literal[32, 16]

FULL_BITS = 16
"""The full cache that a ratio refers to stores keys and values in 16 bits."""

SCALE_BYTES = 2
"""Bytes beside the codes of a packed key or value, or of a grade of its channels: their scale (float16)."""


def tensor_bytes(tokens: int, coded: BitSplit, dense: int) -> int:
    """Bytes of the keys or the values of one KV head, of which `dense` are in 16 bits where the others are packed."""
    head_dim = sum(channels for channels, _ in coded)
    if coded[0][1] >= FULL_BITS:
        return tokens * head_dim * coded[0][1] // 8
    packed = sum(channels * bits // 8 + SCALE_BYTES for channels, bits in coded)
    return dense * head_dim * FULL_BITS // 8 + (tokens - dense) * packed


def full_cache_bytes(geometry: CacheGeometry, context_length: int) -> int:
    """Bytes of the full 16-bit cache of one sequence; sliding layers count the tokens in their window."""
    entries = len(geometry.budgetable) * geometry.kv_heads * context_length
    payload = entries * 2 * geometry.head_dim * FULL_BITS // 8
    return payload + sliding_window_bytes(geometry, FULL_BITS, context_length)


def sliding_window_bytes(geometry: CacheGeometry, bits: int, max_tokens: int | None = None) -> int:
    """Bytes of the sliding layers of one sequence, of `at_most` tokens if given: each keeps its window at the most."""
    windows = [window for window in geometry.windows if window is not None]
    entries = sum(window if max_tokens is None else min(window, max_tokens) for window in windows)
    return entries * geometry.kv_heads * 2 * geometry.head_dim * bits // 8
