"""Slots whose entries are all encoded in the same way."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from baklava.cache.storage.base import (
    NEW,
    Codec,
    Encoded,
    Entries,
    Index,
    Storage,
    expand_index,
    gather_new,
    source_slots,
)
from baklava.cache.storage.slab import TensorSpec

BLOCK_BYTES = 4 << 20
"""Bytes of decoded entries per block: what stays in a CPU's cache. New memory costs more than decoding."""
DEVICE_BLOCK_BYTES = 256 << 20
"""The same on a GPU, where launching a kernel costs more than memory."""
MIN_BLOCK_SLOTS = 256


class SlotStorage(Storage):
    """The tensors that a codec makes of entries; a row of each is one slot."""

    def __init__(self, codec: Codec, template: Entries) -> None:
        self.codec, self.heads, self.head_dim = codec, template.shape[1], template.shape[3]
        self.encoded: Encoded = ()

    @property
    def num_slots(self) -> int:
        """Slots allocated."""
        return self.encoded[0].shape[2]

    @override
    def specs(self, slots: int) -> list[TensorSpec]:
        encoded = [TensorSpec((self.heads, slots, width), dtype) for width, dtype in self.codec.parts]
        return encoded + self.codec.state_specs(self.heads)

    @override
    def bind(self, tensors: Iterator[Tensor]) -> None:
        self.encoded = tuple(next(tensors) for _ in self.codec.parts)
        self.codec.bind(tensors)

    @override
    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.encoded, *self.codec.tensors)

    @override
    @property
    def reads_copy(self) -> bool:
        return self.codec.reads_copy

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
    def select(self, slots: Index, num_old: int, new: Float[Tensor, "batch heads new head_dim"]) -> None:
        self.assign(source_slots(slots, num_old), gather_new(slots, num_old, new), is_first=not num_old)

    def assign(self, source: Index, fresh: Entries, *, is_first: bool) -> None:
        """Write the entries at the sources into the first slots; `fresh` has those whose source is NEW.

        `is_first` says that there are no entries yet, so that fitting the codec changes no stored one.
        """
        if is_first:
            self.codec.fit(fresh, source == NEW)
        if not self.num_slots:
            return
        encoded = self.codec.encode(fresh) if is_first else self._encode_selected(source, fresh)
        for stored, new in zip(self.encoded, encoded, strict=True):
            stored[:, :, : new.shape[2]] = new

    @override
    def replace(self, entries: Entries, where: Bool[Tensor, "batch heads tokens"]) -> None:
        for stored, new in zip(self.encoded, self.codec.encode(entries), strict=True):
            first = stored[:, :, : entries.shape[2]]
            first.copy_(torch.where(where[..., None], new, first))

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
            rows = len(self.encoded[0]) * self.heads * self.head_dim * self.codec.compute_dtype.itemsize
            size = max(MIN_BLOCK_SLOTS, block_bytes // rows)
        if slots <= size:
            yield self.read(slots)
            return
        for start in range(0, slots, size):
            yield self._between(start, min(start + size, slots))

    @override
    def move(self, source: Int[Tensor, "batch heads tokens"], target: Int[Tensor, "batch heads tokens"]) -> None:
        self._put(target, _gather(self.encoded, source))

    def _between(self, start: int, stop: int) -> Entries:
        return self.codec.decode(tuple(part[:, :, start:stop] for part in self.encoded))

    def _encode_selected(self, source: Index, fresh: Entries) -> Encoded:
        new = self.codec.encode(fresh)
        old = _gather(self.encoded, source.clamp(min=0))
        is_old = (source >= 0)[..., None]
        return tuple(torch.where(is_old, *pair) for pair in zip(old, new, strict=True))

    def _put(self, target: Index, encoded: Encoded) -> None:
        for stored, new in zip(self.encoded, encoded, strict=True):
            stored.scatter_(2, expand_index(target, new), new)


def _gather(encoded: Encoded, slots: Tensor) -> Encoded:
    return tuple(part.gather(2, expand_index(slots, part)) for part in encoded)
