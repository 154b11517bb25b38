"""Entries whose channels are coded in different numbers of bits, because not all of them matter alike."""

from collections.abc import Iterator, Sequence
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from baklava.cache.storage.base import Codec, Coded, Entries, Rows
from baklava.cache.storage.quantized_codec import Packed


class Graded(Codec):
    """Packed codes side by side, each of its own channels, which the caller has sorted and made alike."""

    def __init__(self, parts: Sequence[Packed]) -> None:
        self.parts = list(parts)
        self.compute_dtype = self.parts[0].compute_dtype

    @override
    @property
    def copies(self) -> bool:
        return True

    @override
    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @override
    def encode(self, entries: Entries) -> Coded:
        return tuple(tensor for part, own in self._each(entries) for tensor in part.encode(own))

    @override
    def decode(self, coded: Coded) -> Entries:
        return torch.cat([part.decode(pair) for part, pair in zip(self.parts, self._pairs(coded), strict=True)], -1)

    @override
    def dots(self, coded: Coded, rows: Rows) -> Float[Tensor, "batch heads rows tokens"]:
        parts = zip(self._each(rows), self._pairs(coded), strict=True)
        first, second = (part.dots(pair, own) for (part, own), pair in parts)
        return first.add_(second)

    @override
    def mixed(self, coded: Coded, weights: Float[Tensor, "batch heads rows tokens"]) -> Rows:
        pairs = zip(self.parts, self._pairs(coded), strict=True)
        return torch.cat([part.mixed(pair, weights) for part, pair in pairs], -1)

    @override
    def joined(self, others: Sequence[Self]) -> Self:
        columns = zip(self.parts, *(other.parts for other in others), strict=True)
        return type(self)([part.joined(rest) for part, *rest in columns])

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
    def _pairs(coded: Coded) -> list[Coded]:
        return list(zip(coded[::2], coded[1::2], strict=True))

    def _each(self, entries: Entries) -> Iterator[tuple[Packed, Entries]]:
        channels = entries.split([part.head_dim for part in self.parts], -1)
        yield from zip(self.parts, channels, strict=True)
