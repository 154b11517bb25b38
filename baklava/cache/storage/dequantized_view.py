"""A storage together with its entries as they are read, for many reads between few writes."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from baklava.cache.storage.base import Entries, Index, Storage, expand_index
from baklava.cache.storage.slab import TensorSpec


class DequantizedView(Storage):
    """A storage that is read from a dequantized copy, of which writes refresh only the slots that they change.

    The copy is scratch memory of teacher forcing, which evaluation and prompt log-probabilities do. It is not under the
    plan, and `nbytes` does not count it.
    """

    def __init__(self, storage: Storage, slots: int) -> None:
        self.storage = storage
        self.entries = storage.read(slots)

    @override
    def specs(self, slots: int) -> list[TensorSpec]:
        return self.storage.specs(slots)

    @override
    def bind(self, tensors: Iterator[Tensor]) -> None:
        self.storage.bind(tensors)

    @override
    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.storage.tensors

    @override
    @property
    def reads_copy(self) -> bool:
        return False

    @override
    def write(self, start: int, entries: Entries) -> None:
        self.storage.write(start, entries)
        slots = torch.arange(start, start + entries.shape[2], device=entries.device)
        self._refresh(slots.expand(*entries.shape[:2], -1))

    @override
    def scatter(self, slots: Index, entries: Entries) -> None:
        self.storage.scatter(slots, entries)
        self._refresh(slots.expand(*entries.shape[:3]))

    @override
    def select(self, slots: Index, num_old: int, new: Float[Tensor, "batch heads new head_dim"]) -> None:
        self.storage.select(slots, num_old, new)
        self.entries = self.storage.read(self.entries.shape[2])

    @override
    def read(self, slots: int) -> Float[Tensor, "batch heads slots head_dim"]:
        return self.entries[:, :, :slots]

    @override
    def gather(self, slots: Index) -> Entries:
        return self.storage.gather(slots)

    @override
    def round_trip(self, entries: Entries, slots: Index) -> Entries:
        return self.storage.round_trip(entries, slots)

    @override
    def replace(self, entries: Entries, where: Bool[Tensor, "batch heads tokens"]) -> None:
        self.storage.replace(entries, where)
        self.entries[:, :, : entries.shape[2]] = self.storage.read(entries.shape[2])

    @override
    def iter_blocks(self, slots: int) -> Iterator[Float[Tensor, "batch heads block head_dim"]]:
        yield self.read(slots)

    @override
    def move(self, source: Int[Tensor, "batch heads tokens"], target: Int[Tensor, "batch heads tokens"]) -> None:
        self.storage.move(source, target)
        self._refresh(target)

    def _refresh(self, slots: Int[Tensor, "batch heads tokens"]) -> None:
        self.entries.scatter_(2, expand_index(slots, self.entries), self.storage.gather(slots))
