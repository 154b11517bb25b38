"""Entries as they are, in 16 or 32 bits."""

from collections.abc import Sequence
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from baklava.cache.storage.base import Codec, Coded, Entries, Rows, matmul


class Dense(Codec):
    """One tensor. 16 bits are the model's own half type, or float16 for a model that computes in float32."""

    def __init__(self, like: Entries, bits: int) -> None:
        self.compute_dtype = like.dtype
        self.dtype = stored_dtype(like.dtype, bits)

    @override
    @property
    def copies(self) -> bool:
        return self.dtype != self.compute_dtype

    @override
    @property
    def nbytes(self) -> int:
        return 0

    @override
    def encode(self, entries: Entries) -> Coded:
        return (entries.to(self.dtype),)

    @override
    def decode(self, coded: Coded) -> Entries:
        return coded[0].to(self.compute_dtype)

    @override
    def dots(self, coded: Coded, rows: Rows) -> Float[Tensor, "batch heads rows tokens"]:
        return matmul(rows.float(), coded[0].float().transpose(2, 3))

    @override
    def mixed(self, coded: Coded, weights: Float[Tensor, "batch heads rows tokens"]) -> Rows:
        return matmul(weights.float(), coded[0].float())

    @override
    def joined(self, others: Sequence[Self]) -> Self:
        return self

    @override
    def row(self, row: int) -> Self:
        return self

    @override
    def fit(self, entries: Entries, real: Bool[Tensor, "#batch #heads tokens"]) -> None:
        pass

    @override
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        pass


def stored_dtype(computed: torch.dtype, bits: int) -> torch.dtype:
    """The dtype for this many bits of a model that computes in another."""
    if bits == 32:
        return torch.float32
    return torch.float16 if computed.itemsize > 2 else computed
