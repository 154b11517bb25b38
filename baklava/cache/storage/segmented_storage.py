"""Slots in parts that are encoded in different ways, such as sinks in 16 bits before packed entries."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from baklava.cache.storage.base import NEW, Entries, Index, Rows, Storage, gather_new, source_slots, wide
from baklava.cache.storage.slot_storage import SlotStorage


@dataclass
class Segment:
    """Slots `start` to `stop`, as far as there are so many."""

    start: int
    stop: int
    slots: SlotStorage

    @property
    def end(self) -> int:
        """Behind the last slot held."""
        return self.start + self.slots.count

    def within(self, first: int, last: int) -> slice:
        """The part's share of slots `first` to `last`, counted from `first`; empty where it has none."""
        start, stop = max(first, self.start), min(last, self.stop)
        return slice(start - first, max(start, stop) - first)

    def share(self, slots: int) -> int:
        """How many of the first so many slots are here."""
        return min(max(slots - self.start, 0), self.stop - self.start)

    def contains(self, slots: Tensor) -> Tensor:
        """Which slots are here."""
        return (slots >= self.start) & (slots < self.stop)

    def to_local(self, source: Tensor) -> Tensor:
        """Sources as this part counts them, where all that lies elsewhere is FRESH."""
        return torch.where(self.contains(source), source - self.start, torch.where(source >= 0, NEW, source))


class SegmentedStorage(Storage):
    """Storages side by side over one range of slots. An entry is encoded anew only where it moves between parts."""

    def __init__(self, parts: Sequence[Segment]) -> None:
        self.parts = list(parts)

    @override
    @property
    def nbytes(self) -> int:
        return sum(part.slots.nbytes for part in self.parts)

    @override
    @property
    def reads_copy(self) -> bool:
        return True

    @override
    def resize(self, slots: int) -> None:
        for part in self.parts:
            part.slots.resize(part.share(slots))

    @override
    def write(self, start: int, entries: Entries) -> None:
        for part in self.parts:
            here = part.within(start, start + entries.shape[2])
            if here.stop > here.start:
                part.slots.write(start + here.start - part.start, entries[:, :, here])

    @override
    def scatter(self, slots: Index, entries: Entries) -> None:
        self._put(torch.full_like(slots, NEW), slots, entries)

    @override
    def put(self, source: Index, target: Index, fresh: Entries) -> None:
        old = (source >= 0)[..., None]
        self._put(source, target, torch.where(old, self.gather(source.clamp(min=0)), fresh))

    @override
    def select(self, slots: Index, held: int, new: Float[Tensor, "batch heads new head_dim"], size: int) -> None:
        source, fresh = source_slots(slots, held), gather_new(slots, held, new)
        if held:
            old = (source >= 0)[..., None]
            fresh = torch.where(old, self.gather(source.clamp(min=0)), fresh)
        for part in self.parts:
            here = part.within(0, slots.shape[2])
            part.slots.assign(part.to_local(source[..., here]), fresh[:, :, here], part.share(size))

    @override
    def read(self, slots: int) -> Float[Tensor, "batch heads slots head_dim"]:
        read = [part.slots.read(part.share(slots)) for part in self._reached(slots)]
        return read[0] if len(read) == 1 else torch.cat(read, 2)

    @override
    def round_trip(self, entries: Entries, slots: Index) -> Entries:
        stored = [part.slots.round_trip(entries, slots) for part in self.parts]
        result = stored[0]
        for part, other in zip(self.parts[1:], stored[1:], strict=True):
            result = torch.where((slots >= part.start)[..., None], other, result)
        return result

    @override
    def iter_blocks(self, slots: int) -> Iterator[Float[Tensor, "batch heads tile head_dim"]]:
        for part in self._reached(slots):
            yield from part.slots.iter_blocks(part.share(slots))

    @override
    def query_key_scores(self, rows: Rows, slots: int) -> Float[Tensor, "batch heads rows slots"]:
        found = [part.slots.query_key_scores(rows, part.share(slots)) for part in self._reached(slots)]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    @override
    def weighted_values(self, weights: Float[Tensor, "batch heads rows slots"]) -> Rows:
        slots = weights.shape[3]
        weighted_values = [
            part.slots.weighted_values(weights[..., part.within(0, slots)]) for part in self._reached(slots)
        ]
        return functools.reduce(torch.add, weighted_values)

    def stack(self, others: "Sequence[SegmentedStorage]", slots: int) -> "SegmentedStorage":
        """A copy of the first slots of this one and of others of its kind, as rows of one batch."""
        columns = zip(self.parts, *(other.parts for other in others), strict=True)
        parts = []
        for part, *more in columns:
            held = part.slots.stack([each.slots for each in more], part.share(slots))
            parts.append(Segment(part.start, part.stop, held))
        return SegmentedStorage(parts)

    def row(self, row: int) -> "SegmentedStorage":
        """One row, which shares memory with this."""
        return SegmentedStorage([Segment(part.start, part.stop, part.slots.row(row)) for part in self.parts])

    def write_rows(self, starts: Sequence[int], entries: Entries) -> None:
        """Put an entry into each row, at a slot of its own."""
        if (place := self._home(min(starts), max(starts))) is not None:
            part = self.parts[place]
            part.slots.write_rows([start - part.start for start in starts], entries)
            return
        self.scatter(torch.tensor(starts, device=entries.device)[:, None, None].expand(entries.shape[:3]), entries)

    def write_each(self, others: "Sequence[SegmentedStorage]", starts: Sequence[int], entries: Entries) -> None:
        """Put an entry into this one and into each of the others, a row each, at slots of their own."""
        if (place := self._home(min(starts), max(starts))) is not None:
            part, slots = self.parts[place], [each.parts[place].slots for each in others]
            part.slots.write_each(slots, [start - part.start for start in starts], entries)
            return
        for row, (each, start) in enumerate(zip((self, *others), starts, strict=True)):
            each.write(start, entries[row : row + 1])

    @override
    def move(self, source: Int[Tensor, "batch heads tokens"], target: Int[Tensor, "batch heads tokens"]) -> None:
        if part := self._common(source, target):
            part.slots.move(source - part.start, target - part.start)
            return
        self._put(source, target, self.gather(source))

    @override
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        for part in self.parts:
            part.slots.select_rows(rows)

    def _home(self, first: int, last: int) -> int | None:
        """The place of the one part that has these slots and all between, if there is one."""
        return next((at for at, part in enumerate(self.parts) if part.start <= first and last < part.stop), None)

    def _common(self, *slots: Index) -> Segment | None:
        """The one part that has all of these, if there is one."""
        if not slots[0].numel() or torch.compiler.is_compiling():  # a graph cannot look at numbers
            return None
        first, last = map(int, torch.cat([each.flatten() for each in slots]).aminmax())
        place = self._home(first, last)
        return None if place is None else self.parts[place]

    def _reached(self, slots: int) -> list[Segment]:
        return [part for part in self.parts if part.start < slots] or self.parts[:1]

    @override
    def gather(self, slots: Index) -> Entries:
        if part := self._common(slots):
            return part.slots.gather(slots - part.start)
        held = [part for part in self.parts if part.slots.count]
        entries = held[0].slots.gather(slots.clamp(max=held[0].end - 1))
        for part in held[1:]:
            index = (slots - part.start).clamp(0, part.slots.count - 1)
            entries = torch.where((slots >= part.start)[..., None], part.slots.gather(index), entries)
        return entries

    def _put(self, source: Index, target: Index, fresh: Entries) -> None:
        for part in self.parts:
            if part.slots.count:
                part.slots.put(*_moves_into(part, source, target, fresh))


def _moves_into(part: Segment, source: Index, target: Index, fresh: Entries) -> tuple[Tensor, Tensor, Entries]:
    """The moves into a part, as it counts slots.

    Rows differ in how many there are. The others repeat the row's first one; where there is none, all put the first
    slot onto itself.
    """
    here = part.contains(target)
    places = torch.arange(target.shape[2], device=target.device)
    order = torch.where(here, places, here.int().argmax(-1, keepdim=True))
    fresh = fresh.gather(2, wide(order, fresh))
    none = ~here.any(-1, keepdim=True)
    source, target = (each.gather(-1, order).masked_fill(none, part.start) for each in (source, target))
    return part.to_local(source), target - part.start, fresh
