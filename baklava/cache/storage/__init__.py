"""Storage: how entries lie in memory. `storage_for` makes the one that a number of bits asks for."""

from dataclasses import dataclass

from baklava.cache.storage.base import EMPTY, NEW, Codec, Entries, Storage
from baklava.cache.storage.dense_codec import DenseCodec, stored_dtype
from baklava.cache.storage.dequantized_view import DequantizedView
from baklava.cache.storage.mixed_precision_codec import MixedPrecisionCodec
from baklava.cache.storage.quantized_codec import QuantizedCodec
from baklava.cache.storage.segmented_storage import Segment, SegmentedStorage
from baklava.cache.storage.slot_storage import SlotStorage
from baklava.plan.byte_accounting import FULL_BITS, BitSplit

__all__ = [
    "EMPTY",
    "NEW",
    "Codec",
    "DenseCodec",
    "DequantizedView",
    "MixedPrecisionCodec",
    "QuantizedCodec",
    "SegmentedStorage",
    "SlotStorage",
    "Storage",
    "StorageLayout",
    "storage_for",
    "stored_dtype",
]


@dataclass(frozen=True)
class StorageLayout:
    """Which of a head's slots stay in 16 bits where the others are packed: the first `sinks`, the last `staged`."""

    tokens: int
    sinks: int = 0
    staged: int = 0


def storage_for(encoded: BitSplit, template: Entries, layout: StorageLayout, *, centred: bool = False) -> Storage:
    """Empty storage for entries shaped and placed like these; packed ones have been rotated, keys are `centred`.

    `coded` says which channels are in how many bits, in the order in which entries have them.

    Raises:
        UserError: heads of this dimension cannot be packed in so many bits.
    """
    if encoded[0][1] >= FULL_BITS:
        return SlotStorage(DenseCodec(template, encoded[0][1]), template)
    bounds = (0, layout.sinks, layout.tokens - layout.staged, layout.tokens)
    codecs: list[Codec] = [
        DenseCodec(template, FULL_BITS),
        _packed(encoded, template, centred),
        DenseCodec(template, FULL_BITS),
    ]
    ranges = zip(bounds, bounds[1:], codecs, strict=False)
    parts = [Segment(start, stop, SlotStorage(codec, template)) for start, stop, codec in ranges if stop > start]
    return parts[0].slots if len(parts) == 1 else SegmentedStorage(parts)


def _packed(encoded: BitSplit, template: Entries, centred: bool) -> Codec:
    channels = template.split([count for count, _ in encoded], -1)
    parts = [QuantizedCodec(own, bits, centred) for own, (_, bits) in zip(channels, encoded, strict=True)]
    return parts[0] if len(parts) == 1 else MixedPrecisionCodec(parts)
