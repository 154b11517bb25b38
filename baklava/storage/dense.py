"""Entries as they are, in 16 or 32 bits."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from baklava.storage.base import Storage

TILE_BYTES = 4 << 20
"""Converted entries at a time: what a processor keeps near. Fresh memory costs more than the conversion itself."""
MINIMUM_TILE = 256


class DenseStorage(Storage):
    """One tensor. 16 bits are the model's own half type, or float16 for a model that computes in float32."""

    def __init__(self, like: Float[Tensor, "batch heads tokens head_dim"], bits: int) -> None:
        self.compute_dtype = like.dtype
        dtype = stored_dtype(like.dtype, bits)
        batch, heads, _, head_dim = like.shape
        self.slots = torch.empty(batch, heads, 0, head_dim, dtype=dtype, device=like.device)

    @override
    @property
    def nbytes(self) -> int:
        return self.slots.untyped_storage().nbytes()

    @override
    @property
    def copies(self) -> bool:
        return self.slots.dtype != self.compute_dtype

    @override
    def resize(self, slots: int) -> None:
        batch, heads, held, head_dim = self.slots.shape
        resized = self.slots.new_zeros(batch, heads, slots, head_dim)
        kept = min(held, slots)
        resized[:, :, :kept] = self.slots[:, :, :kept]
        self.slots = resized

    @override
    def write(self, start: int, entries: Float[Tensor, "batch heads tokens head_dim"]) -> None:
        self.slots[:, :, start : start + entries.shape[2]] = entries

    @override
    def scatter(
        self, slots: Int[Tensor, "#batch #heads tokens"], entries: Float[Tensor, "batch heads tokens dim"]
    ) -> None:
        self.slots.scatter_(2, _wide(slots, entries), entries.to(self.slots.dtype))

    @override
    def read(self, slots: int) -> Float[Tensor, "batch heads slots head_dim"]:
        return self.slots[:, :, :slots].to(self.compute_dtype)

    @override
    def stored(
        self, entries: Float[Tensor, "batch heads tokens head_dim"]
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        return entries.to(self.slots.dtype).to(self.compute_dtype)

    @override
    def tiles(self, slots: int) -> Iterator[Float[Tensor, "batch heads tile head_dim"]]:
        size = max(MINIMUM_TILE, TILE_BYTES // (self.slots[:, :, :1].numel() * self.compute_dtype.itemsize))
        # A compiler wants the same number of parts for every length.
        if not self.copies or slots <= size or torch.compiler.is_compiling():
            yield self.read(slots)
            return
        for start in range(0, slots, size):
            yield self.slots[:, :, start : min(start + size, slots)].to(self.compute_dtype)

    @override
    def move(self, source: Int[Tensor, "batch heads tokens"], target: Int[Tensor, "batch heads tokens"]) -> None:
        moved = self.slots.gather(2, _wide(source, self.slots))
        self.slots.scatter_(2, _wide(target, self.slots), moved)

    @override
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        self.slots = self.slots.index_select(0, rows.to(self.slots.device))


def stored_dtype(computed: torch.dtype, bits: int) -> torch.dtype:
    """The dtype for this many bits of a model that computes in another."""
    if bits == 32:
        return torch.float32
    return torch.float16 if computed.itemsize > 2 else computed


def _wide(index: Tensor, entries: Tensor) -> Tensor:
    return index[..., None].expand(entries.shape[0], entries.shape[1], index.shape[2], entries.shape[3])
