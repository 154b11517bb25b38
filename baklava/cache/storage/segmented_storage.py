"""Slots in segments that are encoded differently, such as sinks in 16 bits before quantized entries."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from baklava.cache.storage.base import NEW, Entries, Index, Rows, Storage, expand_index, gather_new, source_slots
from baklava.cache.storage.slot_storage import SlotStorage


@dataclass
class Segment:
    """Slots `start` to `stop`, as far as they are allocated."""

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
    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for segment in self.segments for tensor in segment.storage.tensors)

    @override
    @property
    def reads_copy(self) -> bool:
        return True

    @override
    def resize(self, slots: int) -> None:
        for segment in self.segments:
            segment.storage.resize(segment.share(slots))

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
    def select(self, slots: Index, num_old: int, new: Float[Tensor, "batch heads new head_dim"], size: int) -> None:
        source, fresh = source_slots(slots, num_old), gather_new(slots, num_old, new)
        if num_old:
            old = (source >= 0)[..., None]
            fresh = torch.where(old, self.gather(source.clamp(min=0)), fresh)
        for segment in self.segments:
            here = segment.within(0, slots.shape[2])
            segment.storage.assign(segment.to_local(source[..., here]), fresh[:, :, here], segment.share(size))

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
    def iter_blocks(self, slots: int) -> Iterator[Float[Tensor, "batch heads block head_dim"]]:
        for segment in self._segments_of(slots):
            yield from segment.storage.iter_blocks(segment.share(slots))

    @override
    def query_key_scores(self, rows: Rows, slots: int) -> Float[Tensor, "batch heads rows slots"]:
        scores = [segment.storage.query_key_scores(rows, segment.share(slots)) for segment in self._segments_of(slots)]
        return scores[0] if len(scores) == 1 else torch.cat(scores, -1)

    @override
    def weighted_values(self, weights: Float[Tensor, "batch heads rows slots"]) -> Rows:
        slots = weights.shape[3]
        sums = [
            segment.storage.weighted_values(weights[..., segment.within(0, slots)])
            for segment in self._segments_of(slots)
        ]
        return functools.reduce(torch.add, sums)

    def stack(self, others: "Sequence[SegmentedStorage]", slots: int) -> "SegmentedStorage":
        """Return a copy of the first slots of this storage and of others of its kind, as rows of one batch."""
        columns = zip(self.segments, *(other.segments for other in others), strict=True)
        segments = []
        for segment, *more in columns:
            stacked = segment.storage.stack([other.storage for other in more], segment.share(slots))
            segments.append(Segment(segment.start, segment.stop, stacked))
        return SegmentedStorage(segments)

    def row(self, row: int) -> "SegmentedStorage":
        """Return a view of one row."""
        return SegmentedStorage(
            [Segment(segment.start, segment.stop, segment.storage.row(row)) for segment in self.segments]
        )

    def write_rows(self, starts: Sequence[int], entries: Entries) -> None:
        """Write one entry into each row, each at its own slot."""
        if (index := self._segment_index(min(starts), max(starts))) is not None:
            segment = self.segments[index]
            segment.storage.write_rows([start - segment.start for start in starts], entries)
            return
        self.scatter(torch.tensor(starts, device=entries.device)[:, None, None].expand(entries.shape[:3]), entries)

    def write_each(self, others: "Sequence[SegmentedStorage]", starts: Sequence[int], entries: Entries) -> None:
        """Write one entry into this storage and each of the others, which have one row, each at its own slot."""
        if (index := self._segment_index(min(starts), max(starts))) is not None:
            segment, slots = self.segments[index], [other.segments[index].storage for other in others]
            segment.storage.write_each(slots, [start - segment.start for start in starts], entries)
            return
        for row, (storage, start) in enumerate(zip((self, *others), starts, strict=True)):
            storage.write(start, entries[row : row + 1])

    @override
    def move(self, source: Int[Tensor, "batch heads tokens"], target: Int[Tensor, "batch heads tokens"]) -> None:
        if segment := self._only_segment(source, target):
            segment.storage.move(source - segment.start, target - segment.start)
            return
        self._put(source, target, self.gather(source))

    @override
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        for segment in self.segments:
            segment.storage.select_rows(rows)

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
