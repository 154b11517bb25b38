"""Cache layers that attend for themselves, as far as all of them are alike to transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from typing_extensions import override

from baklava.cache import attention
from baklava.cache.attention import (
    AttentionParams,
    BudgetedLayerBase,
    GroupedQueries,
    KVStates,
    QueryStates,
    merge_gqa_groups,
    split_gqa_groups,
)
from baklava.cache.head_groups import GroupBudget, HeadGroup, NewTokens, batched_step, can_batch, head_group
from baklava.errors import UserError
from baklava.eviction import Eviction
from baklava.plan.budget_plan import LayerBudget


class Padding:
    """Counts padding for all layers of a cache; only a forward's first layer looks, as looking waits for a GPU."""

    def __init__(self) -> None:
        self._looked_at: tuple[int, int] | None = None
        self._pads: Int[Tensor, " batch"] | None = None

    def count(self, mask: Tensor, known: Int[Tensor, " batch"] | None, seen: int, total: int) -> Int[Tensor, " batch"]:
        """Padding tokens per row, of a cache that knew of `known` after `seen` tokens and will have seen `total`.

        Padding may grow in a row that has had nothing else yet, as it does where a prompt comes in chunks.

        Raises:
            UserError: the mask hides anything but tokens on the left of a row.
        """
        key = (total, mask.data_ptr())
        if self._pads is None or self._looked_at != key:
            self._pads, self._looked_at = _grown(_left_pads(_real(mask, total)), known, seen), key
        return self._pads

    def forget(self) -> None:
        """Look again at the next forward, whatever it brings."""
        self._looked_at = None


def _grown(pad_lengths: Int[Tensor, " batch"], known: Int[Tensor, " batch"] | None, seen: int) -> Int[Tensor, " batch"]:
    known = torch.zeros_like(pad_lengths) if known is None else known
    if not bool(((pad_lengths == known) | (known >= seen)).all()):
        raise UserError(
            f"the attention mask hides tokens that came after the first {seen}; pad on the left of the first prompt "
            "only"
        )
    return pad_lengths


def _real(padding: Tensor, seen: int) -> Bool[Tensor, "batch tokens"]:
    """Which tokens are real, from the 4D view that our mask function makes of a 2D mask."""
    # A stride of 0 is our own view; another mask is compared row by row.
    one_row = padding.shape[2] == 1 or padding.stride(2) == 0 or bool((padding == padding[:, :, -1:]).all())
    if padding.dtype != torch.bool or not one_row:
        raise UserError(
            "the 4D attention mask hides other tokens from each query, which a budgeted cache cannot keep; pass a 2D "
            "mask with one row per sequence"
        )
    if padding.shape[-1] != seen:
        raise UserError(
            f"the attention mask covers {padding.shape[-1]} tokens, but with this forward the cache has seen {seen}; "
            "pass a mask over all turns"
        )
    return padding[:, 0, -1]


def _left_pads(real: Bool[Tensor, "batch tokens"]) -> Int[Tensor, " batch"]:
    if bool((real[:, 1:] < real[:, :-1]).any()):
        raise UserError(
            "the attention mask hides tokens behind real ones; a budgeted cache takes padding on the left only: set "
            'tokenizer.padding_side = "left"'
        )
    return (~real).sum(-1)


class BudgetedLayer(BudgetedLayerBase):
    """A layer whose KV heads hold different numbers of entries, grouped by equal budgets."""

    def __init__(
        self,
        budget: LayerBudget,
        eviction: Eviction,
        chunk: int | None = None,
        padding: Padding | None = None,
        channels: tuple[str, ...] | None = None,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.budgets, self.eviction, self.chunk, self.max_tokens = (
            _groups(budget, channels),
            eviction,
            chunk,
            max_tokens,
        )
        self.padding = padding or Padding()
        self.groups: list[HeadGroup] = []
        self.pad_lengths: Int[Tensor, " batch"] | None = None
        self.teacher_forced = False
        self.pending_attend = False

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.groups = [head_group(budget, self.eviction, key_states, self.max_tokens) for budget in self.budgets]
        self.is_initialized = True

    def set_max_tokens(self, max_tokens: int | None) -> None:
        """From now on, take at most so many tokens in, and hold no slots beyond."""
        self.max_tokens = max_tokens
        for group in self.groups:
            group.set_max_tokens(max_tokens)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new keys on, tagged with this layer; entries are stored once they have been attended to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.pending_attend = True
        return attention.attach_layer(key_states, self), value_states

    def attend(
        self, query: QueryStates, key: KVStates, value: KVStates, padding: Tensor | None, params: AttentionParams
    ) -> QueryStates:
        """Attend to what is held and to the new tokens, then cut to the budget. Heads are query heads in the output."""
        if not self.pending_attend:
            raise UserError(
                "the model attends twice to keys that it stored once, which a budgeted cache does not follow; choose "
                "another model"
            )
        self.pending_attend = False
        positions = self._positions(key, padding)
        queries = split_gqa_groups(query, query.shape[1] // key.shape[1])
        tokens = NewTokens(
            self.cumulative_length, queries, key, value, positions, self.pad_lengths is not None, self.teacher_forced
        )
        self.advance(tokens.num_tokens)
        if self.chunk is None or tokens.num_tokens <= self.chunk:
            return merge_gqa_groups(self._attend(tokens, params))
        starts = range(0, tokens.num_tokens, self.chunk)
        parts = [tokens.narrow(start, min(start + self.chunk, tokens.num_tokens)) for start in starts]
        return merge_gqa_groups(torch.cat([self._attend(part, params) for part in parts], 3))

    def advance(self, new: int) -> None:
        """Count new tokens; raises UserError where there is no room for them."""
        self._check_max_tokens(new)
        self.cumulative_length += new

    def _check_max_tokens(self, new: int) -> None:
        if self.max_tokens is not None and self.cumulative_length + new > self.max_tokens:
            raise UserError(
                f"{new} tokens behind {self.cumulative_length} in a cache that was made for a sequence of {self.max_tokens}; make it with "
                "more room"
            )

    @property
    def can_batch(self) -> bool:
        """Whether one more token may be taken in together with those of other sequences."""
        alone = self.pending_attend or self.teacher_forced or self.pad_lengths is not None
        return bool(self.groups) and not alone and all(map(can_batch, self.groups))

    def _attend(self, tokens: NewTokens, params: AttentionParams) -> GroupedQueries:
        if len(self.groups) == 1:
            return self.groups[0].attend(tokens, params)
        output = torch.empty_like(tokens.query)
        for group in self.groups:
            group_params = params.for_heads(group.index, tokens.query.shape[2])
            output[:, group.index] = group.attend(tokens.for_heads(group.index), group_params)
        return output

    def _positions(self, key: KVStates, padding: Tensor | None) -> Int[Tensor, "#batch tokens"]:
        positions = torch.arange(self.cumulative_length, self.cumulative_length + key.shape[2], device=key.device)[None]
        if padding is not None:
            self.pad_lengths = self.padding.count(
                padding, self.pad_lengths, self.cumulative_length, self.cumulative_length + key.shape[2]
            )
        return positions if self.pad_lengths is None else positions - self.pad_lengths[:, None]

    def load_prompt(self, key: KVStates, value: KVStates, score: Tensor | None) -> None:
        """Cut a prompt that a full cache has attended to."""
        self._check_max_tokens(key.shape[2])
        self.lazy_initialization(key, value)
        positions = torch.arange(key.shape[2], device=key.device)[None]
        for group in self.groups:
            scores = None if score is None else score[:, group.index]
            group.load_prompt(key[:, group.index], value[:, group.index], scores, positions)
        self.cumulative_length = key.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held, over the whole batch."""
        return sum(group.nbytes for group in self.groups)

    @property
    def num_entries(self) -> int:
        """Entries held by a row, over all KV heads."""
        return sum(group.num_filled * len(group.budget.heads) for group in self.groups)

    def cached_positions(self, head: int, row: int) -> Int[Tensor, " entries"]:
        """Positions that a KV head holds for a row, ascending, counted from the row's first real token."""
        for group in self.groups:
            if head in group.budget.heads:
                kept = group.cached_positions()
                kept = kept.expand(self.batch_size, len(group.budget.heads), -1)[row, group.budget.heads.index(head)]
                return kept[kept >= 0].long().sort().values
        return torch.empty(0, dtype=torch.long)

    @override
    def reset(self) -> None:
        self.groups, self.cumulative_length, self.pad_lengths = [], 0, None
        self.is_initialized = self.pending_attend = self.teacher_forced = False
        self.padding.forget()

    @override
    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    @override
    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.groups:
            rows = torch.arange(self.batch_size)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    @override
    def batch_select_indices(self, indices: Tensor) -> None:
        for group in self.groups:
            group.select_rows(indices)
        if self.pad_lengths is not None:
            self.pad_lengths = self.pad_lengths[indices.to(self.pad_lengths.device)]

    @property
    def batch_size(self) -> int:
        return self.groups[0].keys.read(0).shape[0]

    @override
    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UserError(
                f"crop({tokens_to_remove}) of a cache that has seen {self.cumulative_length} tokens: evicted entries cannot come "
                "back; decode without assisted or prompt-lookup generation"
            )

    @override
    def offload(self) -> None:
        raise UserError("a budgeted cache is not offloaded: it exists to stay small; build it without offloading")

    prefetch = offload


def _groups(budget: LayerBudget, channels: tuple[str, ...] | None) -> list[GroupBudget]:
    shapes = list(zip(budget.tokens, budget.key_bits, budget.value_bits, strict=True))
    members = {shape: tuple(head for head, other in enumerate(shapes) if other == shape) for shape in shapes}
    return [
        GroupBudget(heads, *shape, channels and tuple(channels[head] for head in heads))
        for shape, heads in members.items()
    ]


def batched_attend(
    layers: Sequence[BudgetedLayer], query: QueryStates, key: KVStates, value: KVStates, params: AttentionParams
) -> tuple[QueryStates, dict[int, Exception]]:
    """`attend` of one new token of each sequence, a row each; all are `joinable`, and of one plan.

    Also gives what failed in which rows; their output means nothing.
    """
    positions = torch.tensor([[layer.cumulative_length] for layer in layers], device=key.device)
    failed: dict[int, Exception] = {}
    for row, layer in enumerate(layers):
        try:
            layer.advance(1)
        except UserError as error:
            failed[row] = error
    tokens = NewTokens(0, split_gqa_groups(query, query.shape[1] // key.shape[1]), key, value, positions, False, False)
    output = torch.empty_like(tokens.query)
    for place, group in enumerate(layers[0].groups):
        groups, group_params = (
            [layer.groups[place] for layer in layers],
            params.for_heads(group.index, tokens.query.shape[2]),
        )
        output[:, group.index], broken = batched_step(groups, tokens.for_heads(group.index), group_params)
        failed |= broken
    return merge_gqa_groups(output), failed
