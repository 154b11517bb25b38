"""The storage plug-ins: how the entries of a group of KV heads lie in memory, and how each of them is encoded."""

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
"""Encoded entries: tensors [batch, heads, tokens, any], of which a slot is a row of each."""

EMPTY = -1
"""In place of a slot: nothing that anybody will see."""

NEW = -2
"""In place of a slot: a new entry."""


class Storage(ABC):
    """Slots for the keys or the values of KV heads that share a capacity, `[batch, heads, slots, head_dim]`.

    What is read is in the dtype that the model computes in; what lies in memory is the storage's own affair. An entry
    that stays is never encoded again, so it never drifts.
    """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of memory held, as the allocator counts them."""

    @property
    @abstractmethod
    def reads_copy(self) -> bool:
        """Whether reading makes a copy, because entries are stored in another form than the model computes in."""

    @abstractmethod
    def resize(self, slots: int) -> None:
        """Hold this many slots; the first ones keep their entries."""

    @abstractmethod
    def write(self, start: int, entries: Entries) -> None:
        """Put entries into the slots from `start` on."""

    @abstractmethod
    def scatter(self, slots: Index, entries: Entries) -> None:
        """Put entries into the given slots of each row and head."""

    @abstractmethod
    def put(self, source: Index, target: Index, fresh: Entries) -> None:
        """Put the entries at the source slots into the targets; `fresh` has those that are FRESH."""

    @abstractmethod
    def select(self, slots: Index, held: int, new: Float[Tensor, "batch heads new head_dim"], size: int) -> None:
        """Hold `size` slots, the first with these of the `held` first entries and the new ones behind them.

        `slots` below `held` are old entries, those from there on new ones, NOTHING is none.
        """

    @abstractmethod
    def read(self, slots: int) -> Float[Tensor, "batch heads slots head_dim"]:
        """Entries of the first slots."""

    @abstractmethod
    def gather(self, slots: Index) -> Entries:
        """Entries of these slots of each row and head."""

    @abstractmethod
    def round_trip(self, entries: Entries, slots: Index) -> Entries:
        """These entries as they would be read back from the given slots, without putting them anywhere."""

    @abstractmethod
    def iter_blocks(self, slots: int) -> Iterator[Float[Tensor, "batch heads tile head_dim"]]:
        """The same as `read`, a part at a time where a whole copy would be large; one part where nothing is copied."""

    @abstractmethod
    def query_key_scores(self, rows: Rows, slots: int) -> Float[Tensor, "batch heads rows slots"]:
        """Products of rows with the entries of the first slots, in 32 bits, without reading these out."""

    @abstractmethod
    def weighted_values(self, weights: Float[Tensor, "batch heads rows slots"]) -> Rows:
        """Sums of the entries of the first slots, weighted by each row, in 32 bits, without reading these out."""

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
    def nbytes(self) -> int:
        """Bytes held beside the encoded entries."""

    @abstractmethod
    def encode(self, entries: Entries) -> Encoded:
        """The tensors that stand for these entries."""

    @abstractmethod
    def decode(self, encoded: Encoded) -> Entries:
        """The entries that these tensors stand for, in the dtype that the model computes in."""

    @abstractmethod
    def query_key_scores(self, encoded: Encoded, rows: Rows) -> Float[Tensor, "batch heads rows tokens"]:
        """Products of rows with the entries that these tensors stand for, in 32 bits."""

    @abstractmethod
    def weighted_values(self, encoded: Encoded, weights: Float[Tensor, "batch heads rows tokens"]) -> Rows:
        """Sums of the entries that these tensors stand for, weighted by each row, in 32 bits."""

    @abstractmethod
    def stack(self, others: "Sequence[Self]") -> Self:
        """The codec of a batch whose rows are this one's and those of others of its kind."""

    @abstractmethod
    def row(self, row: int) -> Self:
        """The codec of one row; it shares memory with this one."""

    @abstractmethod
    def fit(self, entries: Entries, real: Bool[Tensor, "#batch #heads tokens"]) -> None:
        """Learn what there is to learn from the first entries that come together, before any slot is held."""

    @abstractmethod
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows of the batch, in this order."""


def wide(index: Tensor, entries: Tensor) -> Tensor:
    """An index of slots, as wide as the entries at those slots."""
    return index[..., None].expand(entries.shape[0], entries.shape[1], index.shape[2], entries.shape[3])


def source_slots(slots: Tensor, held: int) -> Tensor:
    """Where selected entries come from: a slot, FRESH or NOTHING."""
    return torch.where(slots >= held, NEW, slots)


def gather_new(slots: Tensor, held: int, new: Tensor) -> Tensor:
    """The new entries of a selection, at their places in it; elsewhere any."""
    index = (slots - held).clamp(0, new.shape[2] - 1)
    return new.gather(2, wide(index, new))


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Products of matrices over [batch, heads], as one batch of them."""
    product = torch.bmm(left.flatten(0, 1), right.flatten(0, 1))
    return product.view(*left.shape[:2], *product.shape[1:])
