"""Cache layers that attend for themselves, as far as all of them are alike to transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin
from typing_extensions import override

from baklava.cache import attention
from baklava.cache.attention import Grouped, Heads, Kernel, Queries, grouped, ungrouped
from baklava.cache.head_groups import Budget, HeadGroup, Tokens, head_group, joinable, step_together
from baklava.errors import UserError
from baklava.eviction import Eviction
from baklava.plan.budget_plan import LayerBudget


class AttendingLayer(CacheLayerMixin):
    """A layer that takes new keys in when it attends; `seen` are the tokens of a row so far.

    It satisfies `attention.BudgetedLayer` by an `attend` of its own.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def get_seq_length(self) -> int:
        """Tokens seen, not entries held: positions and masks count from it."""
        return self.seen

    @override
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    @override
    def get_max_length(self) -> int:
        return -1


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


def _grown(pads: Int[Tensor, " batch"], known: Int[Tensor, " batch"] | None, seen: int) -> Int[Tensor, " batch"]:
    known = torch.zeros_like(pads) if known is None else known
    if not bool(((pads == known) | (known >= seen)).all()):
        raise UserError(
            f"the attention mask hides tokens that came after the first {seen}; pad on the left of the first prompt "
            "only"
        )
    return pads


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


class RaggedLayer(AttendingLayer):
    """A layer whose KV heads hold different numbers of entries, grouped by equal budgets."""

    def __init__(
        self,
        budget: LayerBudget,
        eviction: Eviction,
        chunk: int | None = None,
        padding: Padding | None = None,
        channels: tuple[str, ...] | None = None,
        room: int | None = None,
    ) -> None:
        super().__init__()
        self.budgets, self.eviction, self.chunk, self.room = _groups(budget, channels), eviction, chunk, room
        self.padding = padding or Padding()
        self.groups: list[HeadGroup] = []
        self.pads: Int[Tensor, " batch"] | None = None
        self.forced = False
        self.waiting = False

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.groups = [head_group(budget, self.eviction, key_states, self.room) for budget in self.budgets]
        self.is_initialized = True

    def limit_to(self, room: int | None) -> None:
        """From now on, take at most so many tokens in, and hold no slots beyond."""
        self.room = room
        for group in self.groups:
            group.limit_to(room)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new keys on, tagged with this layer; entries are stored once they have been attended to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.waiting = True
        return attention.tagged(key_states, self), value_states

    def attend(self, query: Queries, key: Heads, value: Heads, padding: Tensor | None, kernel: Kernel) -> Queries:
        """Attend to what is held and to the new tokens, then cut to the budget. Heads are query heads in the output."""
        if not self.waiting:
            raise UserError(
                "the model attends twice to keys that it stored once, which a budgeted cache does not follow; choose "
                "another model"
            )
        self.waiting = False
        positions = self._positions(key, padding)
        queries = grouped(query, query.shape[1] // key.shape[1])
        tokens = Tokens(self.seen, queries, key, value, positions, self.pads is not None, self.forced)
        self.take(tokens.count)
        if self.chunk is None or tokens.count <= self.chunk:
            return ungrouped(self._attend(tokens, kernel))
        starts = range(0, tokens.count, self.chunk)
        parts = [tokens.part(start, min(start + self.chunk, tokens.count)) for start in starts]
        return ungrouped(torch.cat([self._attend(part, kernel) for part in parts], 3))

    def take(self, new: int) -> None:
        """Count new tokens; raises UserError where there is no room for them."""
        self._check_room(new)
        self.seen += new

    def _check_room(self, new: int) -> None:
        if self.room is not None and self.seen + new > self.room:
            raise UserError(
                f"{new} tokens behind {self.seen} in a cache that was made for a sequence of {self.room}; make it with "
                "more room"
            )

    @property
    def joinable(self) -> bool:
        """Whether one more token may be taken in together with those of other sequences."""
        alone = self.waiting or self.forced or self.pads is not None
        return bool(self.groups) and not alone and all(map(joinable, self.groups))

    def _attend(self, tokens: Tokens, kernel: Kernel) -> Grouped:
        if len(self.groups) == 1:
            return self.groups[0].attend(tokens, kernel)
        output = torch.empty_like(tokens.query)
        for group in self.groups:
            of_group = kernel.for_heads(group.index, tokens.query.shape[2])
            output[:, group.index] = group.attend(tokens.of_heads(group.index), of_group)
        return output

    def _positions(self, key: Heads, padding: Tensor | None) -> Int[Tensor, "#batch tokens"]:
        positions = torch.arange(self.seen, self.seen + key.shape[2], device=key.device)[None]
        if padding is not None:
            self.pads = self.padding.count(padding, self.pads, self.seen, self.seen + key.shape[2])
        return positions if self.pads is None else positions - self.pads[:, None]

    def fill(self, key: Heads, value: Heads, score: Tensor | None) -> None:
        """Cut a prompt that a full cache has attended to."""
        self._check_room(key.shape[2])
        self.lazy_initialization(key, value)
        positions = torch.arange(key.shape[2], device=key.device)[None]
        for group in self.groups:
            scores = None if score is None else score[:, group.index]
            group.fill(key[:, group.index], value[:, group.index], scores, positions)
        self.seen = key.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held, over the whole batch."""
        return sum(group.nbytes for group in self.groups)

    @property
    def entries(self) -> int:
        """Entries held by a row, over all KV heads."""
        return sum(group.filled * len(group.budget.heads) for group in self.groups)

    def kept_positions(self, head: int, row: int) -> Int[Tensor, " entries"]:
        """Positions that a KV head holds for a row, ascending, counted from the row's first real token."""
        for group in self.groups:
            if head in group.budget.heads:
                kept = group.kept()
                kept = kept.expand(self._batch(), len(group.budget.heads), -1)[row, group.budget.heads.index(head)]
                return kept[kept >= 0].long().sort().values
        return torch.empty(0, dtype=torch.long)

    @override
    def reset(self) -> None:
        self.groups, self.seen, self.pads = [], 0, None
        self.is_initialized = self.waiting = self.forced = False
        self.padding.forget()

    @override
    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    @override
    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.groups:
            rows = torch.arange(self._batch())
            self.batch_select_indices(rows.repeat_interleave(repeats))

    @override
    def batch_select_indices(self, indices: Tensor) -> None:
        for group in self.groups:
            group.select_rows(indices)
        if self.pads is not None:
            self.pads = self.pads[indices.to(self.pads.device)]

    def _batch(self) -> int:
        return self.groups[0].keys.read(0).shape[0]

    @override
    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UserError(
                f"crop({tokens_to_remove}) of a cache that has seen {self.seen} tokens: evicted entries cannot come "
                "back; decode without assisted or prompt-lookup generation"
            )

    @override
    def offload(self) -> None:
        raise UserError("a budgeted cache is not offloaded: it exists to stay small; build it without offloading")

    prefetch = offload


def _groups(budget: LayerBudget, channels: tuple[str, ...] | None) -> list[Budget]:
    shapes = list(zip(budget.tokens, budget.key_bits, budget.value_bits, strict=True))
    members = {shape: tuple(head for head, other in enumerate(shapes) if other == shape) for shape in shapes}
    return [
        Budget(heads, *shape, channels and tuple(channels[head] for head in heads)) for shape, heads in members.items()
    ]


def attend_together(
    layers: Sequence[RaggedLayer], query: Queries, key: Heads, value: Heads, kernel: Kernel
) -> tuple[Queries, dict[int, Exception]]:
    """`attend` of one new token of each sequence, a row each; all are `joinable`, and of one plan.

    Also gives what failed in which rows; their output means nothing.
    """
    positions = torch.tensor([[layer.seen] for layer in layers], device=key.device)
    failed: dict[int, Exception] = {}
    for row, layer in enumerate(layers):
        try:
            layer.take(1)
        except UserError as error:
            failed[row] = error
    tokens = Tokens(0, grouped(query, query.shape[1] // key.shape[1]), key, value, positions, False, False)
    output = torch.empty_like(tokens.query)
    for place, group in enumerate(layers[0].groups):
        groups, of_group = (
            [layer.groups[place] for layer in layers],
            kernel.for_heads(group.index, tokens.query.shape[2]),
        )
        output[:, group.index], broken = step_together(groups, tokens.of_heads(group.index), of_group)
        failed |= broken
    return ungrouped(output), failed
