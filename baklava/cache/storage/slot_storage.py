"""Slots whose entries are all encoded in the same way."""

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
    expand_index,
    gather_new,
    source_slots,
)

BLOCK_BYTES = 4 << 20
"""Bytes of decoded entries per block: what stays in a CPU's cache. New memory costs more than decoding."""
DEVICE_BLOCK_BYTES = 256 << 20
"""The same on a GPU, where launching a kernel costs more than memory."""
MIN_BLOCK_SLOTS = 256


class SlotStorage(Storage):
    """The tensors that a codec makes of entries; a row of each is one slot."""

    def __init__(self, codec: Codec, template: Entries) -> None:
        self.codec = codec
        # Copies: even an empty view keeps the memory of its base alive.
        self.encoded = tuple(part.clone() for part in codec.encode(template[:, :, :0]))
        self.slot_bytes = template[:, :, :1].numel() * template.element_size()

    @property
    def num_slots(self) -> int:
        """Slots allocated."""
        return self.encoded[0].shape[2]

    @override
    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.encoded, *self.codec.tensors)

    @override
    @property
    def reads_copy(self) -> bool:
        return self.codec.reads_copy

    @override
    def resize(self, slots: int) -> None:
        self.encoded = _resize(self.encoded, slots)

    @override
    def write(self, start: int, entries: Entries) -> None:
        for stored, new in zip(self.encoded, self.codec.encode(entries), strict=True):
            stored[:, :, start : start + entries.shape[2]] = new

    @override
    def scatter(self, slots: Index, entries: Entries) -> None:
        self._put(slots, self.codec.encode(entries))

    def put(self, source: Index, target: Index, fresh: Entries) -> None:
        """Copy the entries at the source slots to the target slots; `fresh` has those whose source is NEW."""
        self._put(target, self._encode_selected(source, fresh))

    @override
    def select(self, slots: Index, num_old: int, new: Float[Tensor, "batch heads new head_dim"], size: int) -> None:
        self.assign(source_slots(slots, num_old), gather_new(slots, num_old, new), size)

    def assign(self, source: Index, fresh: Entries, size: int) -> None:
        """Allocate `size` slots, the first with the entries at the sources; `fresh` has those whose source is NEW."""
        if not self.num_slots:  # otherwise stored codes would change their meaning
            self.codec.fit(fresh, source == NEW)
        self.encoded = _resize(self._encode_selected(source, fresh), size)

    @override
    def read(self, slots: int) -> Float[Tensor, "batch heads slots head_dim"]:
        return self._between(0, slots)

    @override
    def gather(self, slots: Index) -> Entries:
        return self.codec.decode(_gather(self.encoded, slots))

    @override
    def round_trip(self, entries: Entries, slots: Index) -> Entries:
        return self.codec.decode(self.codec.encode(entries))

    @override
    def iter_blocks(self, slots: int) -> Iterator[Float[Tensor, "batch heads block head_dim"]]:
        size = slots
        if self.reads_copy:
            block_bytes = BLOCK_BYTES if self.encoded[0].device.type == "cpu" else DEVICE_BLOCK_BYTES
            size = max(MIN_BLOCK_SLOTS, block_bytes // self.slot_bytes)
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
        """Return a copy of the first slots of this storage and of others of its kind, as rows of one batch."""
        stacked = copy.copy(self)
        stacked.codec = self.codec.stack([other.codec for other in others])
        parts = zip(self.encoded, *(other.encoded for other in others), strict=True)
        stacked.encoded = tuple(_stack_rows(part, slots) for part in parts)
        return stacked

    def row(self, row: int) -> "SlotStorage":
        """Return a view of one row."""
        own = copy.copy(self)
        own.codec, own.encoded = self.codec.row(row), tuple(part[row : row + 1] for part in self.encoded)
        return own

    def write_rows(self, starts: Sequence[int], entries: Entries) -> None:
        """Write one entry into each row, each at its own slot."""
        self.scatter(torch.tensor(starts, device=entries.device)[:, None, None], entries)

    def write_each(self, others: "Sequence[SlotStorage]", starts: Sequence[int], entries: Entries) -> None:
        """Write one entry into this storage and each of the others, which have one row, each at its own slot."""
        encoded = self.codec.stack([other.codec for other in others]).encode(entries)
        columns = zip(*(part[:, :, 0].split(1) for part in encoded), strict=True)
        for storage, start, row in zip((self, *others), starts, columns, strict=True):
            for stored, new in zip(storage.encoded, row, strict=True):
                stored.select(2, start).copy_(new)

    @override
    def move(self, source: Int[Tensor, "batch heads tokens"], target: Int[Tensor, "batch heads tokens"]) -> None:
        self._put(target, _gather(self.encoded, source))

    @override
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        self.codec.select_rows(rows)
        self.encoded = tuple(part.index_select(0, rows.to(part.device)) for part in self.encoded)

    def _between(self, start: int, stop: int) -> Entries:
        return self.codec.decode(tuple(part[:, :, start:stop] for part in self.encoded))

    def _first(self, slots: int) -> Encoded:
        return tuple(part[:, :, :slots] for part in self.encoded)

    def _encode_selected(self, source: Index, fresh: Entries) -> Encoded:
        new = self.codec.encode(fresh)
        if not self.num_slots:
            return new
        old = _gather(self.encoded, source.clamp(min=0))
        is_old = (source >= 0)[..., None]
        return tuple(torch.where(is_old, *pair) for pair in zip(old, new, strict=True))

    def _put(self, target: Index, encoded: Encoded) -> None:
        for stored, new in zip(self.encoded, encoded, strict=True):
            stored.scatter_(2, expand_index(target, new), new)


def _stack_rows(parts: Sequence[Tensor], slots: int) -> Tensor:
    """Return the first slots of all as one batch, with zeros after shorter ones; a view if there is only one."""
    if len(parts) == 1:
        return parts[0][:, :, :slots]
    if min(part.shape[2] for part in parts) >= slots:
        return torch.cat([part[:, :, :slots] for part in parts])
    first = parts[0]
    batch = first.new_zeros(len(parts), first.shape[1], slots, first.shape[3])
    for row, part in enumerate(parts):
        length = min(slots, part.shape[2])
        batch[row, :, :length] = part[0, :, :length]
    return batch


def _gather(encoded: Encoded, slots: Tensor) -> Encoded:
    return tuple(part.gather(2, expand_index(slots, part)) for part in encoded)


def _resize(encoded: Encoded, slots: int) -> Encoded:
    """Return copies with this many slots."""
    resized = tuple(part.new_zeros(*part.shape[:2], slots, part.shape[3]) for part in encoded)
    for new, old in zip(resized, encoded, strict=True):
        copied = min(slots, old.shape[2])
        new[:, :, :copied] = old[:, :, :copied]
    return resized
