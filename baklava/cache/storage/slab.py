"""Slabs: one allocation for all tensors of a cache layer."""

import math
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to allocate: its shape without the batch, which comes first, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class AllocatedBytes:
    """The bytes of caches that are in use, and the most that ever were."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # garbage collection may end an owner while another one is counted
        self.current = self.peak = 0

    def add(self, nbytes: int) -> None:
        """Count an allocation, or its end if the number is negative."""
        with self._lock:
            self.current += nbytes
            self.peak = max(self.peak, self.current)


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.allocated = AllocatedBytes()


_of_thread = _OfThread()


def allocated_bytes() -> AllocatedBytes:
    """Return the count of what this thread allocates for caches, wherever it ends: slabs, and recorded prompts."""
    return _of_thread.allocated


def count_bytes(owner: object, nbytes: int) -> None:
    """Count bytes that this thread has allocated, until the end of the object that owns them."""
    allocated_bytes().add(nbytes)
    weakref.finalize(owner, allocated_bytes().add, -nbytes)


class Slab:
    """One allocation of exactly the bytes of its tensors, which are views of it and are never allocated again.

    The tensors are ordered by the largest power of two that divides their bytes. So each is aligned to that without
    padding: to its elements, and to the words that packed codes are read in. All numbers are 0 at first. They may be
    written with and without inference mode, wherever the slab is made.

    Args:
        specs: The tensors, in the order of `tensors`.
        batch: Rows of each tensor.
        device: Where to allocate.
    """

    @torch.inference_mode(mode=False)  # within it, a view as another dtype could only be written within it
    def __init__(self, specs: Sequence[TensorSpec], batch: int, device: torch.device) -> None:
        sizes = [batch * spec.dtype.itemsize * _numel(spec.shape) for spec in specs]
        self._memory = allocate(sum(sizes), device)
        count_bytes(self, self.nbytes)
        tensors: list[Tensor | None] = [None] * len(specs)
        start = 0
        for place in sorted(range(len(specs)), key=lambda place: _alignment(sizes[place]), reverse=True):
            stop, spec = start + sizes[place], specs[place]
            tensors[place] = self._memory[start:stop].view(spec.dtype).view(batch, *spec.shape)
            start = stop
        self.tensors = [tensor for tensor in tensors if tensor is not None]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, as the allocator counts them."""
        return self._memory.untyped_storage().nbytes()


def allocate(nbytes: int, device: torch.device) -> Tensor:
    """Return zeros."""
    if device.type == "cpu" and nbytes:
        # calloc: a page takes no memory, and no time, until it is written.
        return torch.from_numpy(np.zeros(nbytes, np.uint8))
    return torch.zeros(nbytes, dtype=torch.uint8, device=device)


def _alignment(nbytes: int) -> float:
    """Return the largest power of two that divides a number of bytes."""
    return nbytes & -nbytes or math.inf


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
