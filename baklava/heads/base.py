"""KV heads of one layer that share a budget: their entries, and how they attend, take in tokens and evict."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from baklava.attention import Grouped, Heads, Kernel
from baklava.eviction import Eviction
from baklava.heads.rotation import Rotation, hadamard, rotated
from baklava.plan import FULL_BITS
from baklava.storage import Layout, Mirrored, storage_for

SPARE = 64
"""Slots that a head below its capacity allocates ahead, so that growing copies seldom."""


@dataclass(frozen=True)
class Budget:
    """What the heads of a group share: which KV heads they are, capacity in entries, bits per stored element."""

    heads: tuple[int, ...]
    tokens: int
    key_bits: int
    value_bits: int

    @property
    def packed(self) -> tuple[bool, bool]:
        """Whether keys and whether values are packed."""
        return self.key_bits < FULL_BITS, self.value_bits < FULL_BITS


@dataclass(frozen=True)
class Tokens:
    """New tokens of a forward, for the heads of one group. Positions are negative for padding.

    `first` is the number of tokens before them in a row, padding included; `padded` tells whether any row has padding,
    `forced` that the tokens are to see what they would see one by one.
    """

    first: int
    query: Grouped
    key: Heads
    value: Heads
    positions: Int[Tensor, "#batch tokens"]
    padded: bool
    forced: bool

    @property
    def count(self) -> int:
        """New tokens per row."""
        return self.key.shape[2]

    def of_heads(self, heads: slice | Int[Tensor, " heads"]) -> "Tokens":
        """The tokens for some of the KV heads."""
        return replace(self, query=self.query[:, heads], key=self.key[:, heads], value=self.value[:, heads])

    def part(self, start: int, stop: int) -> "Tokens":
        """Some of the tokens, in order."""
        rows = slice(start, stop)
        return Tokens(
            self.first + start,
            self.query[:, :, :, rows],
            self.key[:, :, rows],
            self.value[:, :, rows],
            self.positions[:, rows].clone(),  # whoever keeps a view of them would hold on to those of the whole prompt
            self.padded,
            self.forced,
        )


class HeadGroup(ABC):
    """Entries of KV heads with equal budgets; between two forwards at most `budget.tokens` per head.

    Where keys or values are packed, all of them are held rotated, those in 16 bits too: new tokens and their queries
    are rotated as they come in, outputs are rotated back, and whatever scores entries sees rotated queries and keys.
    """

    def __init__(self, budget: Budget, eviction: Eviction, like: Heads) -> None:
        self.budget, self.eviction = budget, eviction
        self.index = _index(budget.heads, like.device)
        like = like[:, : len(budget.heads)]
        signs = hadamard(like.shape[3], like.dtype, like.device) if any(budget.packed) else None
        self.rotation = None if signs is None else Rotation(signs)
        layout = Layout(budget.tokens, eviction.sinks, eviction.interval if eviction.staged else 0)
        self.keys = storage_for(budget.key_bits, like, layout, centred=True)
        self.values = storage_for(budget.value_bits, like, layout)
        self.size = 0
        self.filled = 0

    @property
    def nbytes(self) -> int:
        """Bytes held between two forwards."""
        return self.keys.nbytes + self.values.nbytes + sum(t.untyped_storage().nbytes() for t in self._state())

    def attend(self, tokens: Tokens, kernel: Kernel) -> Grouped:
        """Take in new tokens and return what they attend to; leaves at most the capacity behind."""
        if tokens.forced and not self.filled:  # one by one, the first token would come as a prompt of its own
            parts = [replace(tokens.part(0, 1), forced=False), tokens.part(1, tokens.count)]
            return torch.cat([self.attend(part, kernel) for part in parts if part.count], 3)
        query, key, value = (self._rotated(each) for each in (tokens.query, tokens.key, tokens.value))
        return self._rotated(self._attend(replace(tokens, query=query, key=key, value=value), kernel))

    def fill(self, key: Heads, value: Heads, score: Tensor | None, positions: Int[Tensor, "#batch tokens"]) -> None:
        """Cut a prompt that has been attended to elsewhere to the budget."""
        self._fill(self._rotated(key), self._rotated(value), score, positions)

    @contextmanager
    def mirrored(self) -> Iterator[None]:
        """Within it, entries that are stored in another form than they are computed with are read out once."""
        before = self.keys, self.values
        self.keys, self.values = (Mirrored(each, self.size) if each.copies else each for each in before)
        try:
            yield
        finally:
            self.keys, self.values = before

    @abstractmethod
    def _attend(self, tokens: Tokens, kernel: Kernel) -> Grouped:
        """`attend`, for tokens in the channels that entries are held in."""

    @abstractmethod
    def _fill(self, key: Heads, value: Heads, score: Tensor | None, positions: Int[Tensor, "#batch tokens"]) -> None:
        """`fill`, for a prompt in the channels that entries are held in."""

    @abstractmethod
    def kept(self) -> Int[Tensor, "#batch #heads entries"]:
        """Positions of the entries held; negative where a slot holds none."""

    @abstractmethod
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows of the batch, in this order."""

    def _state(self) -> tuple[Tensor, ...]:
        return ()

    def _grow(self, needed: int) -> None:
        if needed > self.size:
            self.size = min(self.budget.tokens, max(needed + SPARE, self.size * 3 // 2))
            self.keys.resize(self.size)
            self.values.resize(self.size)

    def _replace(self, key: Heads, value: Heads, slots: Int[Tensor, "#batch #heads kept"]) -> None:
        """Hold, of the entries held and these new ones behind them, those at the given slots, and no others."""
        held, self.filled = self.filled, slots.shape[2]
        self.size = min(self.budget.tokens, self.filled + SPARE)
        for storage, new in ((self.keys, key), (self.values, value)):
            storage.select(slots, held, new, self.size)

    def _rotated(self, entries: Tensor) -> Tensor:
        return entries if self.rotation is None else rotated(entries, self.rotation.signs)


def _index(heads: tuple[int, ...], device: torch.device) -> slice | Int[Tensor, " heads"]:
    """Heads side by side are a slice, which copies nothing."""
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    return torch.tensor(heads, device=device)
