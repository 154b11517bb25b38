"""Slots whose entries are all encoded in one way."""

import copy
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from baklava.cache.storage.base import (
    NEW,
    Codec,
    Encoded,
    Entries,
    Index,
    Rows,
    Storage,
    gather_new,
    source_slots,
    wide,
)

BLOCK_BYTES = 4 << 20
"""Converted entries at a time: what a processor keeps near. Fresh memory costs more than the conversion itself."""
DEVICE_BLOCK_BYTES = 256 << 20
"""The same on a GPU, where launching the work on a part costs more than memory does."""
MIN_BLOCK_SLOTS = 256


class SlotStorage(Storage):
    """The tensors that a codec makes of entries; a slot is a row of each."""

    def __init__(self, codec: Codec, template: Entries) -> None:
        self.codec = codec
        # Copies: an empty view would hold on to all that it is a view of.
        self.encoded = tuple(part.clone() for part in codec.encode(template[:, :, :0]))
        self.slot_bytes = template[:, :, :1].numel() * template.element_size()

    @property
    def count(self) -> int:
        """Slots held."""
        return self.encoded[0].shape[2]

    @override
    @property
    def nbytes(self) -> int:
        return self.codec.nbytes + sum(part.untyped_storage().nbytes() for part in self.encoded)

    @override
    @property
    def reads_copy(self) -> bool:
        return self.codec.reads_copy

    @override
    def resize(self, slots: int) -> None:
        self.encoded = _resized(self.encoded, slots)

    @override
    def write(self, start: int, entries: Entries) -> None:
        for mine, new in zip(self.encoded, self.codec.encode(entries), strict=True):
            mine[:, :, start : start + entries.shape[2]] = new

    @override
    def scatter(self, slots: Index, entries: Entries) -> None:
        self._put(slots, self.codec.encode(entries))

    @override
    def put(self, source: Index, target: Index, fresh: Entries) -> None:
        self._put(target, self._picked(source, fresh))

    @override
    def select(self, slots: Index, held: int, new: Float[Tensor, "batch heads new head_dim"], size: int) -> None:
        self.assign(source_slots(slots, held), gather_new(slots, held, new), size)

    def assign(self, source: Index, fresh: Entries, size: int) -> None:
        """Hold `size` slots, the first with the entries at the sources; `fresh` has those that are FRESH."""
        if not self.count:  # what is held already must not come to mean something else
            self.codec.fit(fresh, source == NEW)
        self.encoded = _resized(self._picked(source, fresh), size)

    @override
    def read(self, slots: int) -> Float[Tensor, "batch heads slots head_dim"]:
        return self._between(0, slots)

    @override
    def gather(self, slots: Index) -> Entries:
        return self.codec.decode(_gathered(self.encoded, slots))

    @override
    def round_trip(self, entries: Entries, slots: Index) -> Entries:
        return self.codec.decode(self.codec.encode(entries))

    @override
    def iter_blocks(self, slots: int) -> Iterator[Float[Tensor, "batch heads tile head_dim"]]:
        size = slots
        # A compiler wants the same number of parts for every length.
        if self.reads_copy and not torch.compiler.is_compiling():
            tile = BLOCK_BYTES if self.encoded[0].device.type == "cpu" else DEVICE_BLOCK_BYTES
            size = max(MIN_BLOCK_SLOTS, tile // self.slot_bytes)
        if slots <= size:
            yield self.read(slots)
            return
        for start in range(0, slots, size):
            yield self._between(start, min(start + size, slots))

    @override
    def query_key_scores(self, rows: Rows, slots: int) -> Float[Tensor, "batch heads rows slots"]:
        return self.codec.query_key_scores(self._first(slots), rows)

    @override
    def weighted_values(self, weights: Float[Tensor, "batch heads rows slots"]) -> Rows:
        return self.codec.weighted_values(self._first(weights.shape[3]), weights)

    def stack(self, others: "Sequence[SlotStorage]", slots: int) -> "SlotStorage":
        """A copy of the first slots of this one and of others of its kind, as rows of one batch."""
        joined = copy.copy(self)
        joined.codec = self.codec.stack([other.codec for other in others])
        parts = zip(self.encoded, *(other.encoded for other in others), strict=True)
        joined.encoded = tuple(_rows(part, slots) for part in parts)
        return joined

    def row(self, row: int) -> "SlotStorage":
        """One row, which shares memory with this."""
        own = copy.copy(self)
        own.codec, own.encoded = self.codec.row(row), tuple(part[row : row + 1] for part in self.encoded)
        return own

    def write_rows(self, starts: Sequence[int], entries: Entries) -> None:
        """Put an entry into each row, at a slot of its own."""
        self.scatter(torch.tensor(starts, device=entries.device)[:, None, None], entries)

    def write_each(self, others: "Sequence[SlotStorage]", starts: Sequence[int], entries: Entries) -> None:
        """Put an entry into this one and into each of the others, a row each, at slots of their own."""
        encoded = self.codec.stack([other.codec for other in others]).encode(entries)
        columns = zip(*(part[:, :, 0].split(1) for part in encoded), strict=True)
        for each, start, row in zip((self, *others), starts, columns, strict=True):
            for mine, new in zip(each.encoded, row, strict=True):
                mine.select(2, start).copy_(new)

    @override
    def move(self, source: Int[Tensor, "batch heads tokens"], target: Int[Tensor, "batch heads tokens"]) -> None:
        self._put(target, _gathered(self.encoded, source))

    @override
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        self.codec.select_rows(rows)
        self.encoded = tuple(part.index_select(0, rows.to(part.device)) for part in self.encoded)

    def _between(self, start: int, stop: int) -> Entries:
        return self.codec.decode(tuple(part[:, :, start:stop] for part in self.encoded))

    def _first(self, slots: int) -> Encoded:
        return tuple(part[:, :, :slots] for part in self.encoded)

    def _picked(self, source: Index, fresh: Entries) -> Encoded:
        new = self.codec.encode(fresh)
        if not self.count:
            return new
        own = _gathered(self.encoded, source.clamp(min=0))
        mine = (source >= 0)[..., None]
        return tuple(torch.where(mine, old, one) for old, one in zip(own, new, strict=True))

    def _put(self, target: Index, encoded: Encoded) -> None:
        for mine, new in zip(self.encoded, encoded, strict=True):
            mine.scatter_(2, wide(target, new), new)


def _rows(parts: Sequence[Tensor], slots: int) -> Tensor:
    """One batch of the first slots of all; zeros where one has fewer. Of one alone it is a view."""
    if len(parts) == 1:
        return parts[0][:, :, :slots]
    if min(part.shape[2] for part in parts) >= slots:
        return torch.cat([part[:, :, :slots] for part in parts])
    first = parts[0]
    batch = first.new_zeros(len(parts), first.shape[1], slots, first.shape[3])
    for row, part in enumerate(parts):
        held = min(slots, part.shape[2])
        batch[row, :, :held] = part[0, :, :held]
    return batch


def _gathered(encoded: Encoded, slots: Tensor) -> Encoded:
    return tuple(part.gather(2, wide(slots, part)) for part in encoded)


def _resized(encoded: Encoded, slots: int) -> Encoded:
    """Copies with this many slots, that hold on to nothing else."""
    resized = tuple(part.new_zeros(*part.shape[:2], slots, part.shape[3]) for part in encoded)
    for new, old in zip(resized, encoded, strict=True):
        kept = min(slots, old.shape[2])
        new[:, :, :kept] = old[:, :, :kept]
    return resized
