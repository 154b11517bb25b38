"""Base classes of storage: how the entries of a group of KV heads lie in memory, and how they are encoded."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Entries = Float[Tensor, "batch heads tokens head_dim"]
Rows = Float[Tensor, "batch heads rows head_dim"]
Index = Int[Tensor, "#batch #heads tokens"]
Encoded = tuple[Tensor, ...]
"""Encoded entries: tensors [batch, heads, tokens, any], whose row of a slot is one entry."""

EMPTY = -1
"""Stands for a slot: no entry; what is stored is never visible."""

NEW = -2
"""Stands for a slot: a new entry."""


class Storage(ABC):
    """Slots for the keys or the values of KV heads that share a capacity, `[batch, heads, slots, head_dim]`.

    Entries are read in the dtype that the model computes in, whatever form they are stored in. An entry that is
    retained is never encoded again, so it does not drift.
    """

    @property
    def nbytes(self) -> int:
        """Bytes allocated, as the allocator counts them."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, those of the codec among them."""

    @property
    @abstractmethod
    def reads_copy(self) -> bool:
        """Whether reading makes a copy, because entries are not stored in the dtype that the model computes in."""

    @abstractmethod
    def resize(self, slots: int) -> None:
        """Allocate this many slots; the first ones keep their entries."""

    @abstractmethod
    def write(self, start: int, entries: Entries) -> None:
        """Write entries into the slots from `start` on."""

    @abstractmethod
    def scatter(self, slots: Index, entries: Entries) -> None:
        """Write entries into the given slots of each row and head."""

    @abstractmethod
    def select(self, slots: Index, num_old: int, new: Float[Tensor, "batch heads new head_dim"], size: int) -> None:
        """Allocate `size` slots, the first of them with the selected entries.

        Args:
            slots: Index into the first `num_old` entries followed by the new ones; EMPTY for none.
            num_old: Entries before.
            new: New entries.
            size: Slots to allocate.
        """

    @abstractmethod
    def read(self, slots: int) -> Float[Tensor, "batch heads slots head_dim"]:
        """Return the entries of the first slots."""

    @abstractmethod
    def gather(self, slots: Index) -> Entries:
        """Return the entries of these slots of each row and head."""

    @abstractmethod
    def round_trip(self, entries: Entries, slots: Index) -> Entries:
        """Return entries as they would be read from the given slots, without storing them."""

    @abstractmethod
    def iter_blocks(self, slots: int) -> Iterator[Float[Tensor, "batch heads block head_dim"]]:
        """Yield what `read` returns: in blocks if it must be copied, else as one block."""

    @abstractmethod
    def query_key_scores(self, rows: Rows, slots: int) -> Float[Tensor, "batch heads rows slots"]:
        """Return the products of rows with the keys in the first slots, in 32 bits, without decoding the keys."""

    @abstractmethod
    def weighted_values(self, weights: Float[Tensor, "batch heads rows slots"]) -> Rows:
        """Return the sums of the values in the first slots, weighted by each row, in 32 bits, without decoding them."""

    @abstractmethod
    def move(self, source: Int[Tensor, "batch heads tokens"], target: Int[Tensor, "batch heads tokens"]) -> None:
        """Copy entries from the source slots to the target slots of each row and head."""

    @abstractmethod
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows of the batch, in this order."""


class Codec(ABC):
    """The form in which entries are stored."""

    compute_dtype: torch.dtype

    @property
    @abstractmethod
    def reads_copy(self) -> bool:
        """Whether decoding makes a copy."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors in addition to the encoded entries."""

    @abstractmethod
    def encode(self, entries: Entries) -> Encoded:
        """Return the entries as tensors to store."""

    @abstractmethod
    def decode(self, encoded: Encoded) -> Entries:
        """Return stored entries in the dtype that the model computes in."""

    @abstractmethod
    def query_key_scores(self, encoded: Encoded, rows: Rows) -> Float[Tensor, "batch heads rows tokens"]:
        """Return the products of rows with stored keys, in 32 bits."""

    @abstractmethod
    def weighted_values(self, encoded: Encoded, weights: Float[Tensor, "batch heads rows tokens"]) -> Rows:
        """Return the sums of stored values, weighted by each row, in 32 bits."""

    @abstractmethod
    def stack(self, others: "Sequence[Self]") -> Self:
        """Return the codec of a batch whose rows are this codec's and those of others of its kind."""

    @abstractmethod
    def row(self, row: int) -> Self:
        """Return the codec of one row; it shares memory with this one."""

    @abstractmethod
    def fit(self, entries: Entries, real: Bool[Tensor, "#batch #heads tokens"]) -> None:
        """Fit the codec to the first entries, before any slot is allocated; `real` marks those that are new."""

    @abstractmethod
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows of the batch, in this order."""


def expand_index(index: Tensor, entries: Tensor) -> Tensor:
    """Return an index of slots, expanded over the last dimension of the entries."""
    return index[..., None].expand(entries.shape[0], entries.shape[1], index.shape[2], entries.shape[3])


def source_slots(slots: Tensor, num_old: int) -> Tensor:
    """Return where selected entries come from: a slot, NEW or EMPTY."""
    return torch.where(slots >= num_old, NEW, slots)


def gather_new(slots: Tensor, num_old: int, new: Tensor) -> Tensor:
    """Return the new entries of a selection, at their places in it; the other places have any entry."""
    index = (slots - num_old).clamp(0, new.shape[2] - 1)
    return new.gather(2, expand_index(index, new))


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return products of matrices over [batch, heads], computed as one batch."""
    product = torch.bmm(left.flatten(0, 1), right.flatten(0, 1))
    return product.view(*left.shape[:2], *product.shape[1:])
