"""KV heads of one layer that share a budget: their entries, and how they attend, take in tokens and evict."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava.attention import Grouped, Heads, Kernel
from baklava.eviction import Eviction
from baklava.storage import storage_for

SPARE = 64
"""Slots that a head below its capacity allocates ahead, so that growing copies seldom."""


@dataclass(frozen=True)
class Budget:
    """What the heads of a group share: which KV heads they are, capacity in entries, bits per stored element."""

    heads: tuple[int, ...]
    tokens: int
    key_bits: int
    value_bits: int


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
            self.positions[:, rows],
            self.padded,
            self.forced,
        )


class HeadGroup(ABC):
    """Entries of KV heads with equal budgets; between two forwards at most `budget.tokens` per head."""

    def __init__(self, budget: Budget, eviction: Eviction, like: Heads) -> None:
        self.budget, self.eviction = budget, eviction
        self.index = _index(budget.heads, like.device)
        like = like[:, : len(budget.heads)]
        self.keys = storage_for(budget.key_bits, like)
        self.values = storage_for(budget.value_bits, like)
        self.size = 0
        self.filled = 0

    @property
    def nbytes(self) -> int:
        """Bytes held between two forwards."""
        return self.keys.nbytes + self.values.nbytes + sum(t.untyped_storage().nbytes() for t in self._state())

    @abstractmethod
    def attend(self, tokens: Tokens, kernel: Kernel) -> Grouped:
        """Take in new tokens and return what they attend to; leaves at most the capacity behind."""

    @abstractmethod
    def fill(self, key: Heads, value: Heads, score: Tensor | None, positions: Int[Tensor, "#batch tokens"]) -> None:
        """Cut a prompt that has been attended to elsewhere to the budget."""

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

    def _replace(self, key: Heads, value: Heads) -> None:
        """Hold these entries instead of all others."""
        self.filled = key.shape[2]
        self.size = min(self.budget.tokens, self.filled + SPARE)
        for storage, entries in ((self.keys, key), (self.values, value)):
            storage.resize(0)
            storage.resize(self.size)
            storage.write(0, entries)


def _index(heads: tuple[int, ...], device: torch.device) -> slice | Int[Tensor, " heads"]:
    """Heads side by side are a slice, which copies nothing."""
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    return torch.tensor(heads, device=device)


def take(entries: Heads, index: Tensor) -> Float[Tensor, "batch heads taken head_dim"]:
    """Entries at these slots; the index has a row per sequence, and per head where heads differ."""
    index = index if index.dim() == 3 else index[:, None]
    batch, heads, _, head_dim = entries.shape
    return entries.gather(2, index[..., None].expand(batch, heads, -1, head_dim))
