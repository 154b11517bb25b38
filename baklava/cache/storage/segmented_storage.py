"""Slots in segments that are encoded differently, such as sinks in 16 bits before quantized entries."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from baklava.cache.storage.base import NEW, Entries, Index, Storage, expand_index, gather_new, source_slots
from baklava.cache.storage.slab import TensorSpec
from baklava.cache.storage.slot_storage import SlotStorage


@dataclass
class Segment:
    """Slots `start` to `stop`, as far as there are so many."""

    start: int
    stop: int
    storage: SlotStorage

    @property
    def end(self) -> int:
        """The slot after the last one that is allocated."""
        return self.start + self.storage.num_slots

    def within(self, first: int, last: int) -> slice:
        """Return which of the slots `first` to `last` are here, counted from `first`."""
        start, stop = max(first, self.start), min(last, self.stop)
        return slice(start - first, max(start, stop) - first)

    def share(self, slots: int) -> int:
        """Return how many of the first `slots` slots are here."""
        return min(max(slots - self.start, 0), self.stop - self.start)

    def contains(self, slots: Tensor) -> Tensor:
        """Return which slots are here."""
        return (slots >= self.start) & (slots < self.stop)

    def to_local(self, source: Tensor) -> Tensor:
        """Return sources as slots of this segment; those of other segments become NEW."""
        return torch.where(self.contains(source), source - self.start, torch.where(source >= 0, NEW, source))


class SegmentedStorage(Storage):
    """Storages of adjacent slots. An entry is encoded again only if it moves to another segment."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = list(segments)

    @override
    def specs(self, slots: int) -> list[TensorSpec]:
        return [spec for segment in self.segments for spec in segment.storage.specs(segment.share(slots))]

    @override
    def bind(self, tensors: Iterator[Tensor]) -> None:
        for segment in self.segments:
            segment.storage.bind(tensors)

    @override
    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for segment in self.segments for tensor in segment.storage.tensors)

    @override
    @property
    def reads_copy(self) -> bool:
        return True

    @override
    def write(self, start: int, entries: Entries) -> None:
        for segment in self.segments:
            here = segment.within(start, start + entries.shape[2])
            if here.stop > here.start:
                segment.storage.write(start + here.start - segment.start, entries[:, :, here])

    @override
    def scatter(self, slots: Index, entries: Entries) -> None:
        self._put(torch.full_like(slots, NEW), slots, entries)

    @override
    def select(self, slots: Index, num_old: int, new: Float[Tensor, "batch heads new head_dim"]) -> None:
        source, fresh = source_slots(slots, num_old), gather_new(slots, num_old, new)
        if num_old:
            old = (source >= 0)[..., None]
            fresh = torch.where(old, self.gather(source.clamp(min=0)), fresh)
        for segment in self.segments:
            here = segment.within(0, slots.shape[2])
            segment.storage.assign(segment.to_local(source[..., here]), fresh[:, :, here], is_first=not num_old)

    @override
    def read(self, slots: int) -> Float[Tensor, "batch heads slots head_dim"]:
        entries = [segment.storage.read(segment.share(slots)) for segment in self._segments_of(slots)]
        return entries[0] if len(entries) == 1 else torch.cat(entries, 2)

    @override
    def round_trip(self, entries: Entries, slots: Index) -> Entries:
        stored = [segment.storage.round_trip(entries, slots) for segment in self.segments]
        result = stored[0]
        for segment, other in zip(self.segments[1:], stored[1:], strict=True):
            result = torch.where((slots >= segment.start)[..., None], other, result)
        return result

    @override
    def replace(self, entries: Entries, where: Bool[Tensor, "batch heads tokens"]) -> None:
        for segment in self._segments_of(entries.shape[2]):
            here = slice(segment.start, min(segment.stop, entries.shape[2]))
            segment.storage.replace(entries[:, :, here], where[:, :, here])

    @override
    def iter_blocks(self, slots: int) -> Iterator[Float[Tensor, "batch heads block head_dim"]]:
        for segment in self._segments_of(slots):
            yield from segment.storage.iter_blocks(segment.share(slots))

    @override
    def move(self, source: Int[Tensor, "batch heads tokens"], target: Int[Tensor, "batch heads tokens"]) -> None:
        if segment := self._only_segment(source, target):
            segment.storage.move(source - segment.start, target - segment.start)
            return
        self._put(source, target, self.gather(source))

    def _segment_index(self, first: int, last: int) -> int | None:
        """Return the index of the segment that has the slots from `first` to `last`, if there is one."""
        return next(
            (index for index, segment in enumerate(self.segments) if segment.start <= first and last < segment.stop),
            None,
        )

    def _only_segment(self, *slots: Index) -> Segment | None:
        """Return the segment that has all of these slots, if there is one."""
        if not slots[0].numel():
            return None
        first, last = map(int, torch.cat([index.flatten() for index in slots]).aminmax())
        index = self._segment_index(first, last)
        return None if index is None else self.segments[index]

    def _segments_of(self, slots: int) -> list[Segment]:
        return [segment for segment in self.segments if segment.start < slots] or self.segments[:1]

    @override
    def gather(self, slots: Index) -> Entries:
        if segment := self._only_segment(slots):
            return segment.storage.gather(slots - segment.start)
        filled = [segment for segment in self.segments if segment.storage.num_slots]
        entries = filled[0].storage.gather(slots.clamp(max=filled[0].end - 1))
        for segment in filled[1:]:
            index = (slots - segment.start).clamp(0, segment.storage.num_slots - 1)
            entries = torch.where((slots >= segment.start)[..., None], segment.storage.gather(index), entries)
        return entries

    def _put(self, source: Index, target: Index, fresh: Entries) -> None:
        for segment in self.segments:
            if segment.storage.num_slots:
                segment.storage.put(*_moves_into(segment, source, target, fresh))


def _moves_into(segment: Segment, source: Index, target: Index, fresh: Entries) -> tuple[Tensor, Tensor, Entries]:
    """Return the moves into a segment, with its own slots.

    Rows differ in how many there are: the rest of a row repeats its first move, or moves the first slot onto itself
    if the row has none.
    """
    here = segment.contains(target)
    index = torch.arange(target.shape[2], device=target.device)
    order = torch.where(here, index, here.int().argmax(-1, keepdim=True))
    fresh = fresh.gather(2, expand_index(order, fresh))
    none = ~here.any(-1, keepdim=True)
    source, target = (slots.gather(-1, order).masked_fill(none, segment.start) for slots in (source, target))
    return segment.to_local(source), target - segment.start, fresh
