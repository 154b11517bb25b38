"""Unquantized entries, in 16 or 32 bits."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool
from torch import Tensor
from typing_extensions import override

from baklava.cache.storage.base import Codec, Encoded, Entries
from baklava.cache.storage.slab import TensorSpec


class DenseCodec(Codec):
    """One tensor. 16 bits are the model's own half-precision dtype, or float16 if the model computes in float32."""

    def __init__(self, template: Entries, bits: int) -> None:
        self.head_dim, self.compute_dtype = template.shape[3], template.dtype
        self.dtype = stored_dtype(template.dtype, bits)

    @override
    @property
    def reads_copy(self) -> bool:
        return self.dtype != self.compute_dtype

    @override
    @property
    def parts(self) -> list[tuple[int, torch.dtype]]:
        return [(self.head_dim, self.dtype)]

    @override
    def state_specs(self, heads: int) -> list[TensorSpec]:
        return []

    @override
    def bind(self, tensors: Iterator[Tensor]) -> None:
        """Take nothing: there is no state."""

    @override
    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return ()

    @override
    def fit(self, entries: Entries, real: Bool[Tensor, "#batch #heads tokens"]) -> None:
        """Do nothing: dense entries need no fit."""

    @override
    def encode(self, entries: Entries) -> Encoded:
        return (entries.to(self.dtype),)

    @override
    def decode(self, encoded: Encoded) -> Entries:
        return encoded[0].to(self.compute_dtype)


def stored_dtype(compute_dtype: torch.dtype, bits: int) -> torch.dtype:
    """Return the dtype to store in, for a number of bits and the dtype that the model computes in."""
    if bits == 32:
        return torch.float32
    return torch.float16 if compute_dtype.itemsize > 2 else compute_dtype
