"""Entries that are read, replaced or merged in compiled loops: each takes dozens of PyTorch's operations."""

import functools
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava.cache.kernels.numba_runtime import compiling, kernel, run_on_threads

CHANNEL_MULTIPLE = 32
"""Heads of other dimensions are not for the kernels, since planes of their codes do not fill words of 32 bits."""

MIN_THREAD_ENTRIES = 256
"""Entries to merge for which a thread is woken."""

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


@functools.cache
def prepare_merge(head_dim: int) -> Any:
    """Return the kernel that merges entries of heads of this dimension, compiled unless numba has it on disk."""
    merge, none = kernel().merge_entries, np.empty(0, np.int64)
    entries = np.empty((0, 0, head_dim), np.float32)
    with compiling():
        merge(none, np.empty((0, 0), np.float32), 0, entries, entries, 0, (0,) * head_dim)
    return merge


def merge_entries(
    addresses: Addresses,
    weights: Float[Tensor, "batch heads entries"],
    num_old: int,
    key: Float[Tensor, "batch heads new head_dim"],
    value: Float[Tensor, "batch heads new head_dim"],
    iterations: int,
) -> None:
    """Merge entries into the centroids of their heads, as `Centroids.merge` does.

    Args:
        addresses: Addresses of the rows of the table.
        weights: Of the old entries and then of the new ones; those of weight 0 take no part.
        num_old: How many old ones there are.
        key: New keys, in the channels of the storage.
        value: New values, likewise.
        iterations: Of k-means.
    """
    merge, channels = prepare_merge(key.shape[3]), (0,) * key.shape[3]
    masses = weights.float().flatten(0, 1).contiguous().numpy()
    keys, values = (states.float().flatten(0, 1).numpy() for states in (key, value))

    def run(rows: slice) -> int:
        for row in range(*rows.indices(len(masses))):
            one = slice(row, row + 1)  # a whole prompt is not copied at once
            own_key, own_value = np.ascontiguousarray(keys[one]), np.ascontiguousarray(values[one])
            merge(addresses[one], masses[one], num_old, own_key, own_value, iterations, channels)
        return 0

    run_on_threads(run, np.count_nonzero(masses, axis=1), MIN_THREAD_ENTRIES)
