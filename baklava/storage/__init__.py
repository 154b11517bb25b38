"""Storage: how entries lie in memory. `storage_for` makes the one that a number of bits asks for."""

from jaxtyping import Float
from torch import Tensor

from baklava.storage.base import Storage
from baklava.storage.dense import DenseStorage, stored_dtype

BITS: dict[int, type[DenseStorage]] = {16: DenseStorage, 32: DenseStorage}

__all__ = ["BITS", "DenseStorage", "Storage", "storage_for", "stored_dtype"]


def storage_for(bits: int, like: Float[Tensor, "batch heads tokens head_dim"]) -> Storage:
    """Empty storage for entries shaped and placed like these."""
    return BITS[bits](like, bits)
