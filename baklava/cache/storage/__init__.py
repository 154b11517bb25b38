"""Storage of entries. `storage_for` makes the one for a number of bits."""

from dataclasses import dataclass

from baklava.cache.storage.base import EMPTY, NEW, Codec, Entries, Storage
from baklava.cache.storage.dense_codec import DenseCodec, stored_dtype
from baklava.cache.storage.dequantized_view import DequantizedView
from baklava.cache.storage.quantized_codec import MixedPrecisionCodec, QuantizedCodec
from baklava.cache.storage.segmented_storage import Segment, SegmentedStorage
from baklava.cache.storage.slab import Slab, TensorSpec, allocated_bytes, count_bytes
from baklava.cache.storage.slot_storage import SlotStorage
from baklava.plan.geometry import FULL_BITS, BitSplit

__all__ = [
    "EMPTY",
    "NEW",
    "Codec",
    "DenseCodec",
    "DequantizedView",
    "MixedPrecisionCodec",
    "QuantizedCodec",
    "SegmentedStorage",
    "Slab",
    "SlotStorage",
    "Storage",
    "StorageLayout",
    "TensorSpec",
    "allocated_bytes",
    "count_bytes",
    "storage_for",
    "stored_dtype",
]


@dataclass(frozen=True)
class StorageLayout:
    """Slots of a head, of which the first `sinks` and the last `residual` are never quantized."""

    tokens: int
    sinks: int = 0
    residual: int = 0

    @property
    def residual_start(self) -> int:
        """First slot of the residual."""
        return self.tokens - self.residual


def storage_for(split: BitSplit, template: Entries, layout: StorageLayout, *, centred: bool = False) -> Storage:
    """Return empty storage for entries with the shape, dtype and device of the template.

    Args:
        split: Numbers of channels and their bits, in the order of the channels.
        template: Entries like those to be stored.
        layout: Which slots stay in 16 bits.
        centred: Whether the mean of the first entries is subtracted before quantization, as is done for keys.

    Raises:
        UserError: heads of this dimension do not fill whole bytes in these bits.
    """
    if split[0][1] >= FULL_BITS:
        return SlotStorage(DenseCodec(template, split[0][1]), template)
    bounds = (0, layout.sinks, layout.residual_start, layout.tokens)
    codecs: list[Codec] = [
        DenseCodec(template, FULL_BITS),
        _quantized_codec(split, template, centred),
        DenseCodec(template, FULL_BITS),
    ]
    ranges = zip(bounds, bounds[1:], codecs, strict=False)
    segments = [Segment(start, stop, SlotStorage(codec, template)) for start, stop, codec in ranges if stop > start]
    return segments[0].storage if len(segments) == 1 else SegmentedStorage(segments)


def _quantized_codec(split: BitSplit, template: Entries, centred: bool) -> Codec:
    channels = template.split([count for count, _ in split], -1)
    codecs = [QuantizedCodec(part, bits, centred) for part, (_, bits) in zip(channels, split, strict=True)]
    return codecs[0] if len(codecs) == 1 else MixedPrecisionCodec(codecs)
