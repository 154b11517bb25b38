"""Storage: how entries lie in memory. `storage_for` makes the one that a number of bits asks for."""

from dataclasses import dataclass

from baklava.cache.storage.base import FRESH, NOTHING, Codec, Entries, Storage
from baklava.cache.storage.dense_codec import Dense, stored_dtype
from baklava.cache.storage.dequantized_view import Mirrored
from baklava.cache.storage.mixed_precision_codec import Graded
from baklava.cache.storage.quantized_codec import Packed
from baklava.cache.storage.segmented_storage import Part, Spliced
from baklava.cache.storage.slot_storage import Slots
from baklava.plan.byte_accounting import FULL_BITS, Grades

__all__ = [
    "FRESH",
    "NOTHING",
    "Codec",
    "Dense",
    "Graded",
    "Layout",
    "Mirrored",
    "Packed",
    "Slots",
    "Spliced",
    "Storage",
    "storage_for",
    "stored_dtype",
]


@dataclass(frozen=True)
class Layout:
    """Which of a head's slots stay in 16 bits where the others are packed: the first `sinks`, the last `staged`."""

    tokens: int
    sinks: int = 0
    staged: int = 0


def storage_for(coded: Grades, like: Entries, layout: Layout, *, centred: bool = False) -> Storage:
    """Empty storage for entries shaped and placed like these; packed ones have been rotated, keys are `centred`.

    `coded` says which channels are in how many bits, in the order in which entries have them.

    Raises:
        UserError: heads of this dimension cannot be packed in so many bits.
    """
    if coded[0][1] >= FULL_BITS:
        return Slots(Dense(like, coded[0][1]), like)
    bounds = (0, layout.sinks, layout.tokens - layout.staged, layout.tokens)
    codecs: list[Codec] = [Dense(like, FULL_BITS), _packed(coded, like, centred), Dense(like, FULL_BITS)]
    ranges = zip(bounds, bounds[1:], codecs, strict=False)
    parts = [Part(start, stop, Slots(codec, like)) for start, stop, codec in ranges if stop > start]
    return parts[0].slots if len(parts) == 1 else Spliced(parts)


def _packed(coded: Grades, like: Entries, centred: bool) -> Codec:
    channels = like.split([count for count, _ in coded], -1)
    parts = [Packed(own, bits, centred) for own, (_, bits) in zip(channels, coded, strict=True)]
    return parts[0] if len(parts) == 1 else Graded(parts)
