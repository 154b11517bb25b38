"""The storage plug-in: how the entries of a group of KV heads lie in memory."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from jaxtyping import Float, Int
from torch import Tensor


class Storage(ABC):
    """Slots for the keys or the values of KV heads that share a capacity, `[batch, heads, slots, head_dim]`.

    What `read` returns is in the dtype that the model computes in; what lies in memory is the storage's own affair.
    """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of memory held, as the allocator counts them."""

    @property
    @abstractmethod
    def copies(self) -> bool:
        """Whether reading makes a copy, because entries are stored in another form than the model computes in."""

    @abstractmethod
    def resize(self, slots: int) -> None:
        """Hold this many slots; the first ones keep their entries."""

    @abstractmethod
    def write(self, start: int, entries: Float[Tensor, "batch heads tokens head_dim"]) -> None:
        """Put entries into the slots from `start` on."""

    @abstractmethod
    def scatter(
        self, slots: Int[Tensor, "#batch #heads tokens"], entries: Float[Tensor, "batch heads tokens dim"]
    ) -> None:
        """Put entries into the given slots of each row and head."""

    @abstractmethod
    def read(self, slots: int) -> Float[Tensor, "batch heads slots head_dim"]:
        """Entries of the first slots."""

    @abstractmethod
    def stored(
        self, entries: Float[Tensor, "batch heads tokens head_dim"]
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """These entries as they would be read back, without putting them anywhere."""

    @abstractmethod
    def tiles(self, slots: int) -> Iterator[Float[Tensor, "batch heads tile head_dim"]]:
        """The same as `read`, a part at a time where a whole copy would be large; one part where nothing is copied."""

    @abstractmethod
    def move(self, source: Int[Tensor, "batch heads tokens"], target: Int[Tensor, "batch heads tokens"]) -> None:
        """Copy entries from the source slots to the target slots of each row and head."""

    @abstractmethod
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows of the batch, in this order."""
