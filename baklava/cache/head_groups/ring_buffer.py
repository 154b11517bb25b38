"""Sinks and the newest tokens, in slots that go round."""

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from baklava.cache.attention import (
    AttentionParams,
    GroupedQueries,
    KVStates,
    RingWindow,
    attend,
    attend_blockwise,
    visibility_mask,
)
from baklava.cache.head_groups.base import GroupBudget, HeadGroup, NewTokens
from baklava.cache.storage import EMPTY
from baklava.eviction import Eviction


class RingBufferHeadGroup(HeadGroup):
    """Sinks and the newest tokens. A token's slot follows from its position, so nothing is kept beside the payload."""

    def __init__(
        self, budget: GroupBudget, eviction: Eviction, template: KVStates, max_tokens: int | None = None
    ) -> None:
        super().__init__(budget, eviction, template, max_tokens)
        self.window = RingWindow(eviction.sinks, budget.tokens - eviction.sinks)
        self.last = torch.full((1, 1), -1, device=template.device)

    @override
    def _attend(self, tokens: NewTokens, params: AttentionParams) -> GroupedQueries:
        if tokens.num_tokens == 1 and self.num_filled:
            return self._step(tokens, params)
        return self._block(tokens, params)

    def _step(self, tokens: NewTokens, params: AttentionParams) -> GroupedQueries:
        self._grow(min(self.num_filled + 1, self.budget.tokens))
        self._put(tokens)
        self.num_filled, self.last = min(self.num_filled + 1, self.budget.tokens), tokens.positions
        # Without padding every slot in use is seen, so positions are not even computed.
        held = self.cached_positions() if tokens.padded else tokens.positions[:, None]
        if self.keys.reads_copy or self.values.reads_copy:
            visible = visibility_mask(tokens.positions, held) if tokens.padded else None
            keys, values = self.keys.iter_blocks(self.num_filled), self.values.iter_blocks(self.num_filled)
            return attend_blockwise(tokens.query, keys, values, visible, params)
        key, value = self.keys.read(self.num_filled), self.values.read(self.num_filled)
        return attend(tokens.query, key, value, tokens.positions, held, params, masked=tokens.padded)

    def _put(self, tokens: NewTokens) -> None:
        if tokens.padded or self.keys.reads_copy or self.values.reads_copy:
            # A row that has had only padding writes it where its first token will go. Where storage is in parts, a
            # slot that is a number would be compared with each part's ends: a compiled graph for every outcome.
            slots = self._slots(tokens.positions.clamp(min=0))[:, None]
            self.keys.scatter(slots, tokens.key)
            self.values.scatter(slots, tokens.value)
        else:
            slot = self.window.slot(tokens.num_before)
            self.keys.write(slot, tokens.key)
            self.values.write(slot, tokens.value)

    def _block(self, tokens: NewTokens, params: AttentionParams) -> GroupedQueries:
        new = (tokens.key, tokens.value)
        if tokens.teacher_forced:  # one by one they would be read back as they are stored
            slots = self._slots(tokens.positions.clamp(min=0))[:, None]
            new = self.keys.round_trip(tokens.key, slots), self.values.round_trip(tokens.value, slots)
        key = torch.cat([self.keys.read(self.num_filled), new[0]], 2)
        value = torch.cat([self.values.read(self.num_filled), new[1]], 2)
        held = torch.cat([self.cached_positions().expand(len(tokens.positions), -1, -1), tokens.positions[:, None]], 2)
        window = self.window if tokens.teacher_forced else None
        masked = bool(self.num_filled or tokens.padded or window)
        output = attend(tokens.query, key, value, tokens.positions, held, params, masked=masked, window=window)
        self._retain(tokens.key, tokens.value, tokens.positions)
        return output

    @override
    def _load_prompt(
        self, key: KVStates, value: KVStates, score: Tensor | None, positions: Int[Tensor, "#batch tokens"]
    ) -> None:
        self._retain(key, value, positions)

    def _retain(self, key: KVStates, value: KVStates, positions: Int[Tensor, "#batch new"]) -> None:
        """Of `filled` old entries and these new ones behind them, keep each slot's newest."""
        # A copy: a view would hold on to the positions of the whole prompt.
        old, self.last = self.num_filled, positions[:, -1:].clone()
        total = old + key.shape[2]
        slots = torch.arange(min(self.budget.tokens, total), device=key.device)
        due = self._positions(slots)
        newer = due - positions[:, :1]
        source = torch.where(newer >= 0, old + newer, slots).clamp(0, total - 1)
        self._replace(key, value, torch.where(due >= 0, source, EMPTY)[:, None])

    @override
    def cached_positions(self) -> Int[Tensor, "#batch 1 entries"]:
        return self._positions(torch.arange(self.num_filled, device=self.last.device))[:, None]

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
