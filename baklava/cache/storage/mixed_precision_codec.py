"""Entries whose channels are coded in different numbers of bits, because not all of them matter alike."""

from collections.abc import Iterator, Sequence
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from baklava.cache.storage.base import Codec, Encoded, Entries, Rows
from baklava.cache.storage.quantized_codec import QuantizedCodec


class MixedPrecisionCodec(Codec):
    """Packed codes side by side, each of its own channels, which the caller has sorted and made alike."""

    def __init__(self, parts: Sequence[QuantizedCodec]) -> None:
        self.parts = list(parts)
        self.compute_dtype = self.parts[0].compute_dtype

    @override
    @property
    def reads_copy(self) -> bool:
        return True

    @override
    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @override
    def encode(self, entries: Entries) -> Encoded:
        return tuple(tensor for part, own in self._each(entries) for tensor in part.encode(own))

    @override
    def decode(self, encoded: Encoded) -> Entries:
        return torch.cat([part.decode(pair) for part, pair in zip(self.parts, self._pairs(encoded), strict=True)], -1)

    @override
    def query_key_scores(self, encoded: Encoded, rows: Rows) -> Float[Tensor, "batch heads rows tokens"]:
        parts = zip(self._each(rows), self._pairs(encoded), strict=True)
        first, second = (part.query_key_scores(pair, own) for (part, own), pair in parts)
        return first.add_(second)

    @override
    def weighted_values(self, encoded: Encoded, weights: Float[Tensor, "batch heads rows tokens"]) -> Rows:
        pairs = zip(self.parts, self._pairs(encoded), strict=True)
        return torch.cat([part.weighted_values(pair, weights) for part, pair in pairs], -1)

    @override
    def stack(self, others: Sequence[Self]) -> Self:
        columns = zip(self.parts, *(other.parts for other in others), strict=True)
        return type(self)([part.stack(rest) for part, *rest in columns])

    @override
    def row(self, row: int) -> Self:
        return type(self)([part.row(row) for part in self.parts])

    @override
    def fit(self, entries: Entries, real: Bool[Tensor, "#batch #heads tokens"]) -> None:
        for part, own in self._each(entries):
            part.fit(own, real)

    @override
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        for part in self.parts:
            part.select_rows(rows)

    @staticmethod
    def _pairs(encoded: Encoded) -> list[Encoded]:
        return list(zip(encoded[::2], encoded[1::2], strict=True))

    def _each(self, entries: Entries) -> Iterator[tuple[QuantizedCodec, Entries]]:
        channels = entries.split([part.head_dim for part in self.parts], -1)
        yield from zip(self.parts, channels, strict=True)
