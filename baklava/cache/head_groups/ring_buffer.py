"""Sinks and the most recent tokens, in a ring buffer."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from baklava.cache import table_columns as columns
from baklava.cache.attention import (
    AttentionParams,
    GroupedQueries,
    KVStates,
    RingWindow,
    attend_blockwise,
    visibility_mask,
)
from baklava.cache.head_groups.base import GroupBudget, HeadGroup, NewTokens
from baklava.cache.head_groups.references import References
from baklava.cache.head_groups.score_updates import AttentionInputs
from baklava.cache.head_groups.table import Rows
from baklava.cache.storage import EMPTY, TensorSpec
from baklava.eviction import Eviction


class RingBufferHeadGroup(HeadGroup):
    """Sinks and the most recent tokens. The slot of a token follows from its position, which is not stored."""

    def __init__(
        self, budget: GroupBudget, eviction: Eviction, template: KVStates, max_tokens: int | None = None
    ) -> None:
        super().__init__(budget, eviction, template, max_tokens)
        self.window = RingWindow(eviction.sinks, budget.tokens - eviction.sinks)
        self.device = template.device
        self.pad_lengths: Int[Tensor, "batch 1"] | None = None

    @override
    def _state_specs(self) -> list[TensorSpec]:
        return []

    @override
    def _bind_state(self, tensors: Iterator[Tensor]) -> None:
        """Take nothing: the positions follow from the slots."""

    @override
    def _describe_state(self, rows: Rows) -> None:
        rows[..., columns.RING_LENGTH] = self.window.length

    @property
    def last_position(self) -> Int[Tensor, "#batch 1"]:
        """Position of the newest token of each row; -1 before the first."""
        last = torch.full((1, 1), self._counter(columns.LAST_POSITION), device=self.device)
        return last if self.pad_lengths is None else last - self.pad_lengths

    def _see(self, positions: Int[Tensor, "#batch tokens"], last: int, padded: bool) -> None:
        """Take note of new tokens, the last of which is at `last` in rows without padding."""
        self._count(columns.LAST_POSITION, last)
        self.pad_lengths = last - positions[:, -1:] if padded else None

    @override
    def _attend(self, tokens: NewTokens, params: AttentionParams) -> GroupedQueries:
        if tokens.num_tokens == 1 and self.num_filled:
            return self._step(tokens, params)
        return self._block(tokens, params)

    def _step(self, tokens: NewTokens, params: AttentionParams) -> GroupedQueries:
        self._write(tokens)
        self.num_filled = min(self.num_filled + 1, self.budget.tokens)
        self._see(tokens.positions, tokens.num_before, tokens.padded)
        # Without padding every filled slot is visible, so positions are not even computed.
        positions = self.cached_positions() if tokens.padded else tokens.positions[:, None]
        if self.shared is None and (self.keys.reads_copy or self.values.reads_copy):
            visible = visibility_mask(tokens.positions, positions) if tokens.padded else None
            keys, values = self.keys.iter_blocks(self.num_filled), self.values.iter_blocks(self.num_filled)
            return attend_blockwise(tokens.query, keys, values, visible, params)
        inputs = AttentionInputs(tokens.query, *self.read(), tokens.positions, positions, params, tokens.padded)
        self._share(inputs, tokens.padded, stored=True)
        return inputs.attend(tokens.padded)

    def _write(self, tokens: NewTokens) -> None:
        if tokens.padded:
            # A row that has had only padding writes it into the slot of its first token.
            slots = self._slots(tokens.positions.clamp(min=0))[:, None]
            self.keys.scatter(slots, tokens.key)
            self.values.scatter(slots, tokens.value)
        else:
            slot = self.window.slot(tokens.num_before)
            self.keys.write(slot, tokens.key)
            self.values.write(slot, tokens.value)

    def _block(self, tokens: NewTokens, params: AttentionParams) -> GroupedQueries:
        new = (tokens.key, tokens.value)
        if tokens.teacher_forced:  # one by one they would be read as they are stored
            slots = self._slots(tokens.positions.clamp(min=0))[:, None]
            new = self.keys.round_trip(tokens.key, slots), self.values.round_trip(tokens.value, slots)
        key, value = new
        if self.num_filled:
            key, value = (torch.cat(pair, 2) for pair in zip(self.read(), new, strict=True))
        positions = torch.cat(
            [self.cached_positions().expand(len(tokens.positions), -1, -1), tokens.positions[:, None]], 2
        )
        window = self.window if tokens.teacher_forced else None
        masked = bool(self.num_filled or tokens.padded or window)
        entries = key, value, tokens.positions, positions
        inputs = AttentionInputs(tokens.query, *entries, params, tokens.padded, window=window)
        self._share(inputs, masked, stored=False)
        output = inputs.attend(masked)
        self._retain(tokens.key, tokens.value, tokens.positions, tokens.num_before, tokens.padded)
        return output

    @override
    def _load_prompt(
        self,
        key: KVStates,
        value: KVStates,
        score: Tensor | None,
        positions: Int[Tensor, "#batch tokens"],
        references: References | None,
    ) -> None:
        self._retain(key, value, positions, 0, padded=False)

    def _retain(
        self, key: KVStates, value: KVStates, positions: Int[Tensor, "#batch new"], num_before: int, padded: bool
    ) -> None:
        """Retain the most recent of the old and the new entries of each slot."""
        num_old = self.num_filled
        self._see(positions, num_before + key.shape[2] - 1, padded)
        total = num_old + key.shape[2]
        slots = torch.arange(min(self.budget.tokens, total), device=key.device)
        latest = self._positions(slots)
        newer = latest - positions[:, :1]
        source = torch.where(newer >= 0, num_old + newer, slots).clamp(0, total - 1)
        self._replace(key, value, torch.where(latest >= 0, source, EMPTY)[:, None])

    @override
    def cached_positions(self) -> Int[Tensor, "#batch 1 entries"]:
        return self._positions(torch.arange(self.num_filled, device=self.device))[:, None]

    def _positions(self, slots: Int[Tensor, " slots"]) -> Int[Tensor, "#batch slots"]:
        """Return the most recent position of each slot; -1 if it is empty."""
        laps = (self.last_position - slots).div(self.window.length, rounding_mode="floor")
        laps = torch.where(slots < self.window.sinks, 0, laps.clamp(min=0))
        return torch.where(slots <= self.last_position, slots + laps * self.window.length, -1)

    def _slots(self, positions: Int[Tensor, "#batch tokens"]) -> Int[Tensor, "#batch tokens"]:
        around = self.window.sinks + (positions - self.window.sinks) % self.window.length
        return torch.where(positions < self.window.sinks, positions, around)

    @override
    def restore(self, counters: Sequence[int], pad_lengths: Int[Tensor, " batch"] | None) -> None:
        super().restore(counters, pad_lengths)
        self.pad_lengths = None if pad_lengths is None else pad_lengths[:, None]

    @override
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        if self.pad_lengths is not None:
            self.pad_lengths = self.pad_lengths[rows.to(self.device)]
