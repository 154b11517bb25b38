"""Rows of the table of a layer; see `baklava.cache.table_columns`."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from torch import Tensor

from baklava.cache import table_columns as columns
from baklava.cache.storage import (
    DenseCodec,
    MixedPrecisionCodec,
    QuantizedCodec,
    SegmentedStorage,
    SlotStorage,
    Storage,
)
from baklava.cache.storage.segmented_storage import Segment

Rows = Int[np.ndarray, "batch heads columns"]


def new_rows(batch: int, heads: int) -> Rows:
    """Return the rows of a layer that has no entries yet."""
    rows = np.zeros((batch, heads, columns.NUM_COLUMNS), np.int64)
    rows[..., columns.LAST_POSITION] = -1
    return rows


def row_addresses(rows: Rows) -> Int[np.ndarray, "batch heads"]:
    """Return the address of each row of a table."""
    batch, heads = (np.arange(size) * step for size, step in zip(rows.shape[:2], rows.strides[:2], strict=True))
    return rows.ctypes.data + (batch[:, None] + heads)


def addresses(tensor: Tensor) -> Int[np.ndarray, "batch heads"]:
    """Return the address of the first slot of each row and head; the slots follow one another."""
    assert tensor.numel() == 0 or tensor[0, 0].is_contiguous()
    rows, heads = (np.arange(size) * step for size, step in zip(tensor.shape[:2], tensor.stride()[:2], strict=True))
    return tensor.data_ptr() + (rows[:, None] + heads) * tensor.itemsize


def describe_storage(rows: Int[np.ndarray, "batch heads storage_columns"], storage: Storage) -> None:
    """Write the columns of keys or of values."""
    if isinstance(storage, SegmentedStorage):
        segments: Sequence[Segment] = storage.segments
    else:
        assert isinstance(storage, SlotStorage)
        segments = [Segment(0, columns.NO_SLOT, storage)]
    rows[..., columns.DENSE_BYTES] = 2
    rows[..., columns.QUANTIZED_START] = rows[..., columns.QUANTIZED_STOP] = segments[0].stop
    for segment in segments:
        codec, encoded = segment.storage.codec, segment.storage.encoded
        if isinstance(codec, DenseCodec):
            rows[..., columns.RECENT if segment.start else columns.SINKS] = addresses(encoded[0])
            rows[..., columns.DENSE_BYTES] = encoded[0].itemsize
            continue
        rows[..., columns.QUANTIZED_START], rows[..., columns.QUANTIZED_STOP] = segment.start, segment.stop
        parts = codec.codecs if isinstance(codec, MixedPrecisionCodec) else [codec]
        rows[..., columns.FIRST_CHANNELS] = parts[0].head_dim  # type: ignore[attr-defined]
        for part, packed, scales, first in zip(
            parts, encoded[::2], encoded[1::2], (columns.FIRST_BITS, columns.SECOND_BITS), strict=False
        ):
            assert isinstance(part, QuantizedCodec)
            rows[..., first] = part.bits
            rows[..., first + 1] = addresses(packed)
            rows[..., first + 2] = addresses(scales)
            rows[..., first + 3] = 0 if part.mean is None else addresses(part.mean)
