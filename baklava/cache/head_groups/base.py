"""KV heads of one layer that share a budget: their entries, and how they attend, take in tokens and evict."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from jaxtyping import Int
from torch import Tensor

from baklava.cache.attention import Grouped, Heads, Kernel
from baklava.cache.storage import Layout, Mirrored, storage_for
from baklava.cache.storage.hadamard import Rotation
from baklava.eviction import Eviction
from baklava.plan.byte_accounting import FULL_BITS, Grades, grades

SPARE = 64
"""Slots that a head below its capacity allocates ahead, so that growing copies seldom."""


@dataclass(frozen=True)
class Budget:
    """What the heads of a group share: which KV heads they are, capacity in entries, bits per stored element.

    `channels` are the orders of the heads' key channels, as in a plan, where these differ in their bits.
    """

    heads: tuple[int, ...]
    tokens: int
    key_bits: int
    value_bits: int
    channels: tuple[str, ...] | None = None

    def key_grades(self, head_dim: int) -> Grades:
        """Channels of a key, in their order, and their bits."""
        return grades(head_dim, self.key_bits, self.channels is not None)

    def value_grades(self, head_dim: int) -> Grades:
        """Channels of a value and their bits."""
        return grades(head_dim, self.value_bits, False)

    def key_order(self, device: torch.device) -> Int[Tensor, "heads head_dim"] | None:
        """The order of each head's key channels, where they are graded."""
        if self.channels is None:
            return None
        return torch.tensor([list(bytes.fromhex(order)) for order in self.channels], device=device)


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


class Shared(Protocol):
    """Tensors of which heads of several sequences hold a row each."""

    @property
    def sharers(self) -> int:
        """Rows that still need it."""


class HeadGroup(ABC):
    """Entries of KV heads with equal budgets; between two forwards at most `budget.tokens` per head.

    `room` is the most tokens that a row will have: slots behind it are never held, and nothing else changes.

    Keys that are packed are held rotated, those in 16 bits among them too, and so are values: new tokens and their
    queries are rotated as they come in, outputs are rotated back. Whatever scores entries sees rotated ones.

    While sequences decode together, what is held may be a row of something `shared`; whatever else is done with the
    heads has them stand alone first.
    """

    shared: Shared | None = None

    def __init__(self, budget: Budget, eviction: Eviction, like: Heads, room: int | None = None) -> None:
        self.budget, self.eviction = budget, eviction
        self.limit_to(room)
        self.index = _index(budget.heads, like.device)
        like = like[:, : len(budget.heads)]
        keys, values = (of(like.shape[3]) for of in (budget.key_grades, budget.value_grades))
        self.key_rotation = _rotation(keys, like, budget.key_order(like.device) if len(keys) > 1 else None)
        self.value_rotation = _rotation(values, like)
        layout = Layout(budget.tokens, eviction.sinks, eviction.interval if eviction.staged else 0)
        self.keys = storage_for(keys, like, layout, centred=True)
        self.values = storage_for(values, like, layout)
        self.size = 0
        self.filled = 0

    @property
    def nbytes(self) -> int:
        """Bytes held between two forwards; of what is shared, a share."""
        held = self.keys.nbytes + self.values.nbytes + sum(t.untyped_storage().nbytes() for t in self._state())
        return held if self.shared is None else held // self.shared.sharers

    def stand_alone(self) -> None:
        """Hold copies of all that is shared with others."""
        if self.shared is not None:
            self.select_rows(torch.zeros(1, dtype=torch.long))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        self.stand_alone()  # a copy of a row would be one of all rows
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def attend(self, tokens: Tokens, kernel: Kernel) -> Grouped:
        """Take in new tokens and return what they attend to; leaves at most the capacity behind."""
        self.stand_alone()
        if tokens.forced and not self.filled:  # one by one, the first token would come as a prompt of its own
            parts = [replace(tokens.part(0, 1), forced=False), tokens.part(1, tokens.count)]
            return torch.cat([self.attend(part, kernel) for part in parts if part.count], 3)
        query, key = (_turned(self.key_rotation, each) for each in (tokens.query, tokens.key))
        value = _turned(self.value_rotation, tokens.value)
        output = self._attend(replace(tokens, query=query, key=key, value=value), kernel)
        return output if self.value_rotation is None else self.value_rotation.turned_back(output)

    def fill(self, key: Heads, value: Heads, score: Tensor | None, positions: Int[Tensor, "#batch tokens"]) -> None:
        """Cut a prompt that has been attended to elsewhere to the budget."""
        self.stand_alone()
        self._fill(_turned(self.key_rotation, key), _turned(self.value_rotation, value), score, positions)

    def limit_to(self, room: int | None) -> None:
        """From now on, hold no more slots than a sequence of so many tokens can fill."""
        self.slots = self.budget.tokens if room is None else min(self.budget.tokens, room)

    @contextmanager
    def mirrored(self) -> Iterator[None]:
        """Within it, entries that are stored in another form than they are computed with are read out once."""
        self.stand_alone()
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
            self.size = min(self.slots, max(needed + SPARE, self.size * 3 // 2))
            self.keys.resize(self.size)
            self.values.resize(self.size)

    def _replace(self, key: Heads, value: Heads, slots: Int[Tensor, "#batch #heads kept"]) -> None:
        """Hold, of the entries held and these new ones behind them, those at the given slots, and no others."""
        held, self.filled = self.filled, slots.shape[2]
        self.size = min(self.slots, self.filled + SPARE)
        for storage, new in ((self.keys, key), (self.values, value)):
            storage.select(slots, held, new, self.size)


def _rotation(coded: Grades, like: Heads, order: Int[Tensor, "heads head_dim"] | None = None) -> Rotation | None:
    """What makes channels alike that are coded in the same bits; nothing where entries are not packed."""
    if coded[0][1] >= FULL_BITS:
        return None
    return Rotation.of(tuple(channels for channels, _ in coded), like, order)


def _turned(rotation: Rotation | None, entries: Tensor) -> Tensor:
    return entries if rotation is None else rotation.turned(entries)


def _index(heads: tuple[int, ...], device: torch.device) -> slice | Int[Tensor, " heads"]:
    """Heads side by side are a slice, which copies nothing."""
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    return torch.tensor(heads, device=device)
