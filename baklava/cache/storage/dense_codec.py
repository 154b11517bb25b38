"""Unquantized entries, in 16 or 32 bits."""

from collections.abc import Sequence
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from baklava.cache.storage.base import Codec, Encoded, Entries, Rows, matmul


class DenseCodec(Codec):
    """One tensor. 16 bits are the model's own half-precision dtype, or float16 if the model computes in float32."""

    def __init__(self, template: Entries, bits: int) -> None:
        self.compute_dtype = template.dtype
        self.dtype = stored_dtype(template.dtype, bits)

    @override
    @property
    def reads_copy(self) -> bool:
        return self.dtype != self.compute_dtype

    @override
    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return ()

    @override
    def encode(self, entries: Entries) -> Encoded:
        return (entries.to(self.dtype),)

    @override
    def decode(self, encoded: Encoded) -> Entries:
        return encoded[0].to(self.compute_dtype)

    @override
    def query_key_scores(self, encoded: Encoded, rows: Rows) -> Float[Tensor, "batch heads rows tokens"]:
        return matmul(rows.float(), encoded[0].float().transpose(2, 3))

    @override
    def weighted_values(self, encoded: Encoded, weights: Float[Tensor, "batch heads rows tokens"]) -> Rows:
        return matmul(weights.float(), encoded[0].float())

    @override
    def stack(self, others: Sequence[Self]) -> Self:
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


def stored_dtype(compute_dtype: torch.dtype, bits: int) -> torch.dtype:
    """Return the dtype to store in, for a number of bits and the dtype that the model computes in."""
    if bits == 32:
        return torch.float32
    return torch.float16 if compute_dtype.itemsize > 2 else compute_dtype
