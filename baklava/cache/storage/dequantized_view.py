"""A storage together with its entries as they are read, for many reads between few writes."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from baklava.cache.storage.base import Entries, Index, Rows, Storage, expand_index, matmul


class DequantizedView(Storage):
    """A storage that is read from a dequantized copy, of which writes refresh only the slots that they change.

    The copy is scratch memory of teacher forcing, which evaluation and prompt log-probabilities do. It is not under the
    plan, and `nbytes` does not count it.
    """

    def __init__(self, storage: Storage, slots: int) -> None:
        self.storage = storage
        self.entries = storage.read(slots)

    @override
    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.storage.tensors

    @override
    @property
    def reads_copy(self) -> bool:
        return False

    @override
    def resize(self, slots: int) -> None:
        self.storage.resize(slots)
        batch, heads, old_slots, head_dim = self.entries.shape
        entries = self.entries.new_zeros(batch, heads, slots, head_dim)
        copied = min(old_slots, slots)
        entries[:, :, :copied] = self.entries[:, :, :copied]
        self.entries = entries

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
    def select(self, slots: Index, num_old: int, new: Float[Tensor, "batch heads new head_dim"], size: int) -> None:
        self.storage.select(slots, num_old, new, size)
        self.entries = self.storage.read(size)

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
    def iter_blocks(self, slots: int) -> Iterator[Float[Tensor, "batch heads block head_dim"]]:
        yield self.read(slots)

    @override
    def query_key_scores(self, rows: Rows, slots: int) -> Float[Tensor, "batch heads rows slots"]:
        return matmul(rows.float(), self.read(slots).float().transpose(2, 3))

    @override
    def weighted_values(self, weights: Float[Tensor, "batch heads rows slots"]) -> Rows:
        return matmul(weights.float(), self.read(weights.shape[3]).float())

    @override
    def move(self, source: Int[Tensor, "batch heads tokens"], target: Int[Tensor, "batch heads tokens"]) -> None:
        self.storage.move(source, target)
        self._refresh(target)

    @override
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        self.storage.select_rows(rows)
        self.entries = self.entries.index_select(0, rows.to(self.entries.device))

    def _refresh(self, slots: Int[Tensor, "batch heads tokens"]) -> None:
        self.entries.scatter_(2, expand_index(slots, self.entries), self.storage.gather(slots))
