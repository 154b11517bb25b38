"""A storage with its entries read out beside it, for many reads between few writes."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from baklava.cache.storage.base import Entries, Index, Rows, Storage, matmul, wide


class DequantizedView(Storage):
    """Reads come from a mirror, of which only the slots that were written are read out again.

    The mirror is scratch of who scores a continuation in one forward: it is no part of what a plan holds, so it does
    not count, and serving never makes one.
    """

    def __init__(self, storage: Storage, slots: int) -> None:
        self.storage = storage
        self.mirror = storage.read(slots)  # a copy, where storage has another form

    @override
    @property
    def nbytes(self) -> int:
        return self.storage.nbytes

    @override
    @property
    def reads_copy(self) -> bool:
        return False

    @override
    def resize(self, slots: int) -> None:
        self.storage.resize(slots)
        batch, heads, held, head_dim = self.mirror.shape
        mirror = self.mirror.new_zeros(batch, heads, slots, head_dim)
        kept = min(held, slots)
        mirror[:, :, :kept] = self.mirror[:, :, :kept]
        self.mirror = mirror

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
    def put(self, source: Index, target: Index, fresh: Entries) -> None:
        self.storage.put(source, target, fresh)
        self._refresh(target.expand(*fresh.shape[:3]))

    @override
    def select(self, slots: Index, held: int, new: Float[Tensor, "batch heads new head_dim"], size: int) -> None:
        self.storage.select(slots, held, new, size)
        self.mirror = self.storage.read(size)

    @override
    def read(self, slots: int) -> Float[Tensor, "batch heads slots head_dim"]:
        return self.mirror[:, :, :slots]

    @override
    def gather(self, slots: Index) -> Entries:
        return self.storage.gather(slots)

    @override
    def round_trip(self, entries: Entries, slots: Index) -> Entries:
        return self.storage.round_trip(entries, slots)

    @override
    def iter_blocks(self, slots: int) -> Iterator[Float[Tensor, "batch heads tile head_dim"]]:
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
        self.mirror = self.mirror.index_select(0, rows.to(self.mirror.device))

    def _refresh(self, slots: Int[Tensor, "batch heads tokens"]) -> None:
        self.mirror.scatter_(2, wide(slots, self.mirror), self.storage.gather(slots))
