"""Entries whose channels are coded in different numbers of bits, because not all of them matter alike."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from typing_extensions import override

from baklava.storage.base import Codec, Coded, Entries
from baklava.storage.packed import Packed


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
        pairs = zip(coded[::2], coded[1::2], strict=True)
        return torch.cat([part.decode(pair) for part, pair in zip(self.parts, pairs, strict=True)], -1)

    @override
    def fit(self, entries: Entries, real: Bool[Tensor, "#batch #heads tokens"]) -> None:
        for part, own in self._each(entries):
            part.fit(own, real)

    @override
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        for part in self.parts:
            part.select_rows(rows)

    def _each(self, entries: Entries) -> Iterator[tuple[Packed, Entries]]:
        channels = entries.split([part.head_dim for part in self.parts], -1)
        yield from zip(self.parts, channels, strict=True)
