"""Quantized entries, read and replaced in compiled loops: each takes dozens of PyTorch's operations."""

import functools
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava.cache.kernels.numba_runtime import compiling, kernel

CHANNEL_MULTIPLE = 32
"""Heads of other dimensions are not for the kernels, since planes of their codes do not fill words of 32 bits."""

Addresses = Int[np.ndarray, " rows"]


def can_compile_entries(states: Tensor) -> bool:
    """Return whether entries like these states can be read and replaced here."""
    is_float32 = states.device.type == "cpu" and states.dtype == torch.float32
    return is_float32 and states.shape[3] % CHANNEL_MULTIPLE == 0 and kernel() is not None


@functools.cache
def prepare() -> Any:
    """Return the kernels, after they have been compiled unless numba has them on disk."""
    module, none = kernel(), np.empty(0, np.int64)
    entries = np.empty((0, 0, CHANNEL_MULTIPLE), np.float32)
    with compiling():
        module.read_entries(none, 0, entries)
        module.select_entries(none, 0, np.empty((0, 0), np.int64), 0, entries)
    return module


def read_entries(addresses: Addresses, part: int, shape: tuple[int, int, int, int]) -> Float[Tensor, "..."]:
    """Return the first entries, in the channels of the storage.

    Args:
        addresses: Addresses of the rows of the table.
        part: 0 for keys, 1 for values.
        shape: Rows, heads, entries and channels.
    """
    entries = np.empty((shape[0] * shape[1], *shape[2:]), np.float32)
    prepare().read_entries(addresses, part, entries)
    return torch.from_numpy(entries).view(shape)


def select_entries(
    addresses: Addresses, part: int, slots: Int[Tensor, "batch heads slots"], num_old: int, new: Float[Tensor, "..."]
) -> None:
    """Fill the first slots with the entries at `slots`, which index the old entries followed by the new ones."""
    # Under autocast values have 16 bits.
    sources, entries = slots.flatten(0, 1).contiguous().numpy(), new.float().flatten(0, 1).contiguous().numpy()
    prepare().select_entries(addresses, part, sources, num_old, entries)
