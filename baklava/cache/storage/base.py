"""Base classes of storage: how the entries of a group of KV heads lie in memory, and how they are encoded."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from baklava.cache.storage.slab import TensorSpec

Entries = Float[Tensor, "batch heads tokens head_dim"]
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
    retained is never encoded again, so it does not drift, unless its value is fitted anew.

    A storage says which tensors it needs (`specs`), and is used once it has them (`bind`). The first entries come by
    `select`.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @abstractmethod
    def specs(self, slots: int) -> list[TensorSpec]:
        """Return the tensors that this many slots need."""

    @abstractmethod
    def bind(self, tensors: Iterator[Tensor]) -> None:
        """Take the tensors of the specs, in their order."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the specs."""

    @property
    @abstractmethod
    def reads_copy(self) -> bool:
        """Whether reading makes a copy, because entries are not stored in the dtype that the model computes in."""

    @abstractmethod
    def write(self, start: int, entries: Entries) -> None:
        """Write entries into the slots from `start` on."""

    @abstractmethod
    def scatter(self, slots: Index, entries: Entries) -> None:
        """Write entries into the given slots of each row and head."""

    @abstractmethod
    def select(self, slots: Index, num_old: int, new: Float[Tensor, "batch heads new head_dim"]) -> None:
        """Retain the selected entries in the first slots.

        Args:
            slots: Index into the first `num_old` entries followed by the new ones; EMPTY for none.
            num_old: Entries before. If there are none, the codec is fitted to the new ones.
            new: New entries.
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
    def replace(self, entries: Entries, where: Bool[Tensor, "batch heads tokens"]) -> None:
        """Write these entries into the first slots where the mask says so; the others are not encoded again."""

    @abstractmethod
    def iter_blocks(self, slots: int) -> Iterator[Float[Tensor, "batch heads block head_dim"]]:
        """Yield what `read` returns: in blocks if it must be copied, else as one block."""

    @abstractmethod
    def move(self, source: Int[Tensor, "batch heads tokens"], target: Int[Tensor, "batch heads tokens"]) -> None:
        """Copy entries from the source slots to the target slots of each row and head."""


class Codec(ABC):
    """The form in which entries are stored."""

    compute_dtype: torch.dtype

    @property
    @abstractmethod
    def reads_copy(self) -> bool:
        """Whether decoding makes a copy."""

    @property
    @abstractmethod
    def parts(self) -> list[tuple[int, torch.dtype]]:
        """Width and dtype of each tensor that entries are encoded as."""

    @abstractmethod
    def state_specs(self, heads: int) -> list[TensorSpec]:
        """Return the tensors that the codec needs in addition to the encoded entries."""

    @abstractmethod
    def bind(self, tensors: Iterator[Tensor]) -> None:
        """Take the tensors of `state_specs`, in their order; `fit` initialises them."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of `state_specs`."""

    @abstractmethod
    def encode(self, entries: Entries) -> Encoded:
        """Return the entries as tensors to store."""

    @abstractmethod
    def decode(self, encoded: Encoded) -> Entries:
        """Return stored entries in the dtype that the model computes in."""

    @abstractmethod
    def fit(self, entries: Entries, real: Bool[Tensor, "#batch #heads tokens"]) -> None:
        """Fit the codec to the first entries; `real` marks those that are stored."""


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
