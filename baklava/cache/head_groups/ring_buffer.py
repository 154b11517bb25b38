"""Sinks and the newest tokens, in slots that go round."""

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from baklava.cache.attention import Grouped, Heads, Kernel, Window, attend, attend_tiles, seen
from baklava.cache.head_groups.base import Budget, HeadGroup, Tokens
from baklava.cache.storage import NOTHING
from baklava.eviction import Eviction


class Ring(HeadGroup):
    """Sinks and the newest tokens. A token's slot follows from its position, so nothing is kept beside the payload."""

    def __init__(self, budget: Budget, eviction: Eviction, like: Heads, room: int | None = None) -> None:
        super().__init__(budget, eviction, like, room)
        self.window = Window(eviction.sinks, budget.tokens - eviction.sinks)
        self.last = torch.full((1, 1), -1, device=like.device)

    @override
    def _attend(self, tokens: Tokens, kernel: Kernel) -> Grouped:
        if tokens.count == 1 and self.filled:
            return self._step(tokens, kernel)
        return self._block(tokens, kernel)

    def _step(self, tokens: Tokens, kernel: Kernel) -> Grouped:
        self._grow(min(self.filled + 1, self.budget.tokens))
        self._put(tokens)
        self.filled, self.last = min(self.filled + 1, self.budget.tokens), tokens.positions
        # Without padding every slot in use is seen, so positions are not even computed.
        held = self.kept() if tokens.padded else tokens.positions[:, None]
        if self.keys.copies or self.values.copies:
            visible = seen(tokens.positions, held) if tokens.padded else None
            keys, values = self.keys.tiles(self.filled), self.values.tiles(self.filled)
            return attend_tiles(tokens.query, keys, values, visible, kernel)
        key, value = self.keys.read(self.filled), self.values.read(self.filled)
        return attend(tokens.query, key, value, tokens.positions, held, kernel, masked=tokens.padded)

    def _put(self, tokens: Tokens) -> None:
        if tokens.padded or self.keys.copies or self.values.copies:
            # A row that has had only padding writes it where its first token will go. Where storage is in parts, a
            # slot that is a number would be compared with each part's ends: a compiled graph for every outcome.
            slots = self._slots(tokens.positions.clamp(min=0))[:, None]
            self.keys.scatter(slots, tokens.key)
            self.values.scatter(slots, tokens.value)
        else:
            slot = self.window.slot(tokens.first)
            self.keys.write(slot, tokens.key)
            self.values.write(slot, tokens.value)

    def _block(self, tokens: Tokens, kernel: Kernel) -> Grouped:
        new = (tokens.key, tokens.value)
        if tokens.forced:  # one by one they would be read back as they are stored
            slots = self._slots(tokens.positions.clamp(min=0))[:, None]
            new = self.keys.stored(tokens.key, slots), self.values.stored(tokens.value, slots)
        key = torch.cat([self.keys.read(self.filled), new[0]], 2)
        value = torch.cat([self.values.read(self.filled), new[1]], 2)
        held = torch.cat([self.kept().expand(len(tokens.positions), -1, -1), tokens.positions[:, None]], 2)
        window = self.window if tokens.forced else None
        masked = bool(self.filled or tokens.padded or window)
        output = attend(tokens.query, key, value, tokens.positions, held, kernel, masked=masked, window=window)
        self._keep(tokens.key, tokens.value, tokens.positions)
        return output

    @override
    def _fill(self, key: Heads, value: Heads, score: Tensor | None, positions: Int[Tensor, "#batch tokens"]) -> None:
        self._keep(key, value, positions)

    def _keep(self, key: Heads, value: Heads, positions: Int[Tensor, "#batch new"]) -> None:
        """Of `filled` old entries and these new ones behind them, keep each slot's newest."""
        # A copy: a view would hold on to the positions of the whole prompt.
        old, self.last = self.filled, positions[:, -1:].clone()
        total = old + key.shape[2]
        slots = torch.arange(min(self.budget.tokens, total), device=key.device)
        due = self._positions(slots)
        newer = due - positions[:, :1]
        source = torch.where(newer >= 0, old + newer, slots).clamp(0, total - 1)
        self._replace(key, value, torch.where(due >= 0, source, NOTHING)[:, None])

    @override
    def kept(self) -> Int[Tensor, "#batch 1 entries"]:
        return self._positions(torch.arange(self.filled, device=self.last.device))[:, None]

    def _positions(self, slots: Int[Tensor, " slots"]) -> Int[Tensor, "#batch slots"]:
        """The newest position that belongs to each slot; -1 where none has come yet."""
        laps = (self.last - slots).div(self.window.length, rounding_mode="floor")
        laps = torch.where(slots < self.window.sinks, 0, laps.clamp(min=0))
        return torch.where(slots <= self.last, slots + laps * self.window.length, -1)

    def _slots(self, positions: Int[Tensor, "#batch tokens"]) -> Int[Tensor, "#batch tokens"]:
        around = self.window.sinks + (positions - self.window.sinks) % self.window.length
        return torch.where(positions < self.window.sinks, positions, around)

    @override
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        self.keys.select_rows(rows)
        self.values.select_rows(rows)
        if self.last.shape[0] > 1:
            self.last = self.last[rows.to(self.last.device)]
