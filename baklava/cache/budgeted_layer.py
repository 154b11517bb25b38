"""A cache layer whose KV heads have budgets, and the left padding that all layers of a cache share."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import ref

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from typing_extensions import override

from baklava.cache.attention import (
    AttentionParams,
    BudgetedLayerBase,
    GroupedQueries,
    KVStates,
    QueryStates,
    merge_gqa_groups,
    split_gqa_groups,
)
from baklava.cache.head_groups import (
    GroupBudget,
    HeadGroup,
    LayerTable,
    NewTokens,
    ReferenceQueries,
    References,
    head_group,
)
from baklava.cache.kernels.fused_decode import can_fuse, fused_step, fused_steps
from baklava.cache.rotary_shift import RotaryShift
from baklava.cache.score_predictor import ScorePredictor, mix_orders
from baklava.cache.storage import Slab
from baklava.errors import UserError
from baklava.eviction import Eviction
from baklava.plan.budget_plan import LayerBudget


class Padding:
    """Counts left padding once per forward for all layers of a cache: reading a mask waits for the GPU."""

    def __init__(self) -> None:
        self._mask: ref[Tensor] | None = None  # not its address: that of a freed mask is soon another one's
        self._num_tokens = 0
        self._pad_lengths: Int[Tensor, " batch"] | None = None

    def count(
        self, mask: Tensor, known: Int[Tensor, " batch"] | None, num_before: int, num_tokens: int
    ) -> Int[Tensor, " batch"]:
        """Return the padding tokens of each row.

        Padding may grow in a row that has had nothing else yet, as in a prompt that comes in chunks.

        Args:
            mask: The 4D mask of this forward; all layers of a forward get the same tensor.
            known: Padding per row before this forward.
            num_before: Tokens per row before this forward.
            num_tokens: Tokens per row after this forward.

        Raises:
            UserError: the mask hides anything but tokens on the left of a row.
        """
        is_known = self._mask is not None and self._mask() is mask and self._num_tokens == num_tokens
        if self._pad_lengths is None or not is_known:
            pad_lengths = _left_padding(_real_tokens(mask, num_tokens))
            before = torch.zeros_like(pad_lengths) if known is None else known
            if not bool(((pad_lengths == before) | (before >= num_before)).all()):
                raise UserError(
                    f"the attention mask hides tokens that came after the first {num_before}; pad only the first "
                    "prompt, and on its left"
                )
            self._pad_lengths, self._mask, self._num_tokens = pad_lengths, ref(mask), num_tokens
        return self._pad_lengths

    def reset(self) -> None:
        """Read the mask of the next forward even if it is the same tensor."""
        self._mask = None


def _real_tokens(mask: Tensor, num_tokens: int) -> Bool[Tensor, "batch tokens"]:
    """Return which tokens are real, from the 4D view that our mask function makes of a 2D mask."""
    # A stride of 0 is our own view; the rows of any other mask are compared.
    same_rows = mask.shape[2] == 1 or mask.stride(2) == 0 or bool((mask == mask[:, :, -1:]).all())
    if mask.dtype != torch.bool or not same_rows:
        raise UserError(
            "the 4D attention mask hides different tokens from different queries, which a budgeted cache does not "
            "support; pass a 2D mask with one row per sequence"
        )
    if mask.shape[-1] != num_tokens:
        raise UserError(
            f"the attention mask covers {mask.shape[-1]} tokens, but with this forward the cache has seen "
            f"{num_tokens}; pass new tokens only (use_cache=True), and a mask over all turns"
        )
    return mask[:, 0, -1]


def _left_padding(real: Bool[Tensor, "batch tokens"]) -> Int[Tensor, " batch"]:
    if bool((real[:, 1:] < real[:, :-1]).any()):
        raise UserError(
            "the attention mask hides tokens after real ones; a budgeted cache supports padding on the left only: set "
            'tokenizer.padding_side = "left"'
        )
    return (~real).sum(-1)


class BudgetedLayer(BudgetedLayerBase):
    """A layer whose KV heads may have different numbers of entries; heads with equal budgets form a group.

    Args:
        budget: Capacity and bits of each KV head.
        eviction: The method that decides which entries are retained.
        prefill_chunk: Tokens of a prompt that attend at a time, before they are compressed; None for all.
        padding: The count of left padding that all layers of a cache share.
        key_channels: The order of each head's key channels, if their bits differ.
        max_tokens: The largest number of tokens that a sequence will have.
        predictor: Of the scores of a prompt, if the method predicts them.
        num_sharing: How many layers have no keys of their own, and read those of this one. They attend to exactly what
            this layer attends to in the same forward, before its evictions, and are not observed by its scores.
    """

    def __init__(
        self,
        budget: LayerBudget,
        eviction: Eviction,
        prefill_chunk: int | None = None,
        padding: Padding | None = None,
        key_channels: tuple[str, ...] | None = None,
        max_tokens: int | None = None,
        predictor: ScorePredictor | None = None,
        num_sharing: int = 0,
    ) -> None:
        super().__init__()
        self.group_budgets, self.eviction = _group_heads(budget, key_channels), eviction
        self.predictor = predictor
        self.prefill_chunk, self.max_tokens = prefill_chunk, max_tokens
        self.padding = padding or Padding()
        self.pad_lengths: Int[Tensor, " batch"] | None = None
        self.groups: list[HeadGroup] = []
        self.slab: Slab | None = None
        self.table: LayerTable | None = None
        self.teacher_forced = False
        self.num_sharing, self.pending_shared = num_sharing, 0

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.groups = [head_group(budget, self.eviction, key_states, self.max_tokens) for budget in self.group_budgets]
        self._allocate(len(key_states), key_states.device)
        self.dtype, self.is_initialized = key_states.dtype, True

    def _allocate(self, batch: int, device: torch.device) -> None:
        """Allocate all that this layer will ever have, at once."""
        self.slab = Slab([spec for group in self.groups for spec in group.specs()], batch, device)
        self.table = LayerTable(self.groups, batch, iter(self.slab.tensors))

    def copy(self, max_tokens: int | None, memo: dict[int, Any] | None = None) -> "BudgetedLayer":
        """Return an independent layer with a slab of its own, for sequences of at most `max_tokens` tokens.

        Args:
            max_tokens: As in the class.
            memo: What the copies of several layers share, as in `copy.deepcopy`.
        """
        memo = {} if memo is None else memo
        # Entries are copied only once, into a slab of another size.
        shared = [] if self.slab is None else [self.slab, *self.slab.tensors]
        memo.update({id(one): one for one in (self.eviction, self.predictor, *shared)})
        copied = copy.copy(self)
        memo[id(self)] = copied
        copied.table = None
        copied.__dict__ = {name: copy.deepcopy(value, memo) for name, value in copied.__dict__.items()}
        copied.move_to_new_slab(max_tokens)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "BudgetedLayer":
        """Return `copy` for sequences of the same length: kernels write where the table says."""
        return self.copy(self.max_tokens, memo)

    def move_to_new_slab(self, max_tokens: int | None, rows: Int[Tensor, " rows"] | None = None) -> None:
        """Copy the entries into a slab of their own, for sequences of at most `max_tokens` tokens.

        Args:
            max_tokens: As in the class.
            rows: The rows of the batch to keep, in this order; None for all.
        """
        self.max_tokens = max_tokens
        if self.slab is None:
            return
        before = self.slab
        for group in self.groups:
            group.drop_dequantized()
            group.set_max_tokens(max_tokens)
        first = before.tensors[0]
        self._allocate(len(first) if rows is None else len(rows), first.device)
        for source, target in zip(before.tensors, self.slab.tensors, strict=True):
            slots = min(source.shape[2], target.shape[2])
            kept = source if rows is None else source.index_select(0, rows.to(source.device))
            target[:, :, :slots] = kept[:, :, :slots]

    def snapshot(self) -> dict[str, Tensor]:
        """Return all that the layer holds between two forwards, by name; the tensors are its own."""
        if self.slab is None:
            return {}
        tensors = {f"slab {number}": tensor for number, tensor in enumerate(self.slab.tensors)}
        tensors["counters"] = torch.tensor([group.counters for group in self.groups])
        tensors["num_tokens"] = torch.tensor(self.cumulative_length)
        return tensors if self.pad_lengths is None else tensors | {"pad_lengths": self.pad_lengths}

    def restore(self, tensors: Mapping[str, Tensor], template: KVStates) -> None:
        """Go on from a snapshot of a layer with the same budget and `max_tokens`, with tensors of its own.

        Args:
            tensors: The snapshot.
            template: A key or value as the model makes them, of which the batch, the dtype and the device count.

        Raises:
            ValueError: the tensors are not those of such a layer.
        """
        if not tensors:
            return
        self.lazy_initialization(template, template)
        assert self.slab is not None
        for number, own in enumerate(self.slab.tensors):
            saved = tensors[f"slab {number}"]
            if (saved.shape, saved.dtype) != (own.shape, own.dtype):
                raise ValueError(f"slab {number} is {tuple(saved.shape)} of {saved.dtype}")
            own.copy_(saved)
        self.cumulative_length = int(tensors["num_tokens"])
        pad_lengths = tensors.get("pad_lengths")
        self.pad_lengths = None if pad_lengths is None else pad_lengths.to(template.device)
        for group, counters in zip(self.groups, tensors["counters"].tolist(), strict=True):
            group.restore(counters, self.pad_lengths)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Attach this layer to the new keys; `attend` stores them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != self.batch_size:
            raise UserError(
                f"{len(key_states)} sequences go on in a cache of {self.batch_size}; begin with a new cache, or call "
                "batch_select_indices with the row that each of them continues"
            )
        return self.attach(key_states), value_states

    @override
    def attend(
        self, query: QueryStates, key: KVStates, value: KVStates, padding: Tensor | None, params: AttentionParams
    ) -> QueryStates:
        """Return the output of new tokens over the cached entries and themselves, and store them within the budget."""
        if not self.pending_attend:
            return self._attend_shared(query, key.shape[1], params)
        self.pending_attend, self.pending_shared = False, self.num_sharing
        for group in self.groups:
            group.shared = [] if self.num_sharing else None
        num_new, num_before = key.shape[2], self.cumulative_length
        positions = torch.arange(num_before, num_before + num_new, device=key.device)[None]
        if padding is not None:
            self.pad_lengths = self.padding.count(padding, self.pad_lengths, num_before, num_before + num_new)
        if self.pad_lengths is not None:
            positions = positions - self.pad_lengths[:, None]
        self.advance(num_new)
        queries = split_gqa_groups(query, query.shape[1] // key.shape[1])
        padded = self.pad_lengths is not None
        is_decoded = num_new == 1 or self.teacher_forced
        if self.table and is_decoded and not (padded or self.num_sharing) and can_fuse(self.groups, key):
            return merge_gqa_groups(fused_steps(self.table, (queries, key, value), num_before, params))
        tokens = NewTokens(num_before, queries, key, value, positions, padded, self.teacher_forced)
        if self.prefill_chunk is None or num_new <= self.prefill_chunk:
            return merge_gqa_groups(self._attend(tokens, params))
        chunks = [
            tokens.narrow(start, min(start + self.prefill_chunk, num_new))
            for start in range(0, num_new, self.prefill_chunk)
        ]
        return merge_gqa_groups(torch.cat([self._attend(chunk, params) for chunk in chunks], 3))

    def _attend_shared(self, query: QueryStates, kv_heads: int, params: AttentionParams) -> QueryStates:
        """Return the output of a layer that reads the keys of this one."""
        if not self.pending_shared:
            raise UserError(
                "the model attends twice to keys that it stored once, which a budgeted cache does not support; choose "
                "another model"
            )
        self.pending_shared -= 1
        queries = split_gqa_groups(query, query.shape[1] // kv_heads)
        output = torch.empty_like(queries)
        for group in self.groups:
            group_params = params.for_heads(group.index, queries.shape[2])
            output[:, group.index] = group.attend_shared(queries[:, group.index], group_params)
            if not self.pending_shared:
                group.shared = None
        return merge_gqa_groups(output)

    @contextmanager
    def teacher_forcing(self) -> Iterator[None]:
        """Let all tokens of a forward within this context attend to exactly what they would attend to one by one."""
        self.teacher_forced = True
        try:
            yield
        finally:
            self.teacher_forced = False
            for group in self.groups:
                group.drop_dequantized()

    def _attend(self, tokens: NewTokens, params: AttentionParams) -> GroupedQueries:
        if (count := self.eviction.num_references) and self.groups[0].is_prompt(tokens):
            references = ReferenceQueries.draw(tokens.query, tokens.positions, count, params)
            predicted = None
            if self.predictor is not None:
                assert params.rotary_shift is not None  # the references have been drawn with it
                predicted = self.predictor.predict(tokens.key, tokens.value, params.rotary_shift)
            tokens = replace(tokens, references=references, predicted=predicted)
        if tokens.teacher_forced:
            for group in self.groups:
                if group.num_filled:
                    group.dequantize()
        if len(self.groups) == 1:
            return self.groups[0].attend(tokens, params)
        output = torch.empty_like(tokens.query)
        for group in self.groups:
            group_params = params.for_heads(group.index, tokens.query.shape[2])
            output[:, group.index] = group.attend(tokens.for_heads(group.index), group_params)
        return output

    def advance(self, num_new: int) -> None:
        """Count new tokens; raises UserError if the sequence would exceed `max_tokens`."""
        if self.max_tokens is not None and self.cumulative_length + num_new > self.max_tokens:
            raise UserError(
                f"{num_new} tokens after {self.cumulative_length} in a cache with max_tokens {self.max_tokens}; make "
                "the cache with a larger max_tokens"
            )
        self.cumulative_length += num_new

    def load_prompt(
        self,
        key: KVStates,
        value: KVStates,
        score: Tensor | None,
        references: References | None = None,
        rotary: RotaryShift | None = None,
    ) -> None:
        """Compress the keys and values of a prompt that a full cache has attended to.

        Args:
            key: The keys.
            value: The values.
            score: The scores, of methods that score a prompt.
            references: What values are fitted to, if they are.
            rotary: How the layer rotates its keys, which predictions need.
        """
        self.advance(key.shape[2])
        self.lazy_initialization(key, value)
        positions = torch.arange(key.shape[2], device=key.device)[None]
        if self.predictor is not None:
            assert score is not None
            assert rotary is not None
            predicted = self.predictor.predict(key, value, rotary)
            score = mix_orders(score, predicted, self.eviction.predicted_share, positions[:, None] >= 0)
        for group in self.groups:
            scores = None if score is None else score[:, group.index]
            own = references and references.for_heads(group.index)
            group.load_prompt(key[:, group.index], value[:, group.index], scores, positions, own)

    def can_fuse(self, states: Tensor) -> bool:
        """Return whether the kernel can decode the next token, for queries, keys and values like these."""
        is_busy = self.pending_attend or self.teacher_forced or self.pad_lengths is not None or self.num_sharing > 0
        return bool(self.groups) and not is_busy and can_fuse(self.groups, states)

    @property
    def nbytes(self) -> int:
        """Bytes that the whole batch has allocated, as the allocator counts them."""
        return 0 if self.slab is None else self.slab.nbytes

    @property
    def num_entries(self) -> int:
        """KV entries of a row, over all KV heads."""
        return sum(group.num_filled * len(group.budget.heads) for group in self.groups)

    @property
    def batch_size(self) -> int:
        """Rows of the batch; the layer must have seen a token."""
        return len(self.groups[0].keys.tensors[0])

    def cached_positions(self, head: int, row: int) -> Int[Tensor, " entries"]:
        """Return the positions that a KV head caches for a row, ascending, counted from the row's first real token."""
        for group in self.groups:
            if head in group.budget.heads:
                positions = group.cached_positions().expand(self.batch_size, len(group.budget.heads), -1)
                positions = positions[row, group.budget.heads.index(head)]
                return positions[positions >= 0].long().sort().values
        return torch.empty(0, dtype=torch.long)

    @override
    def reset(self) -> None:
        self.groups, self.slab, self.table, self.cumulative_length, self.pad_lengths = [], None, None, 0, None
        self.is_initialized = self.pending_attend = self.teacher_forced = False
        self.padding.reset()

    @override
    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    @override
    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.groups:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    @override
    def batch_select_indices(self, indices: Tensor) -> None:
        if self.slab is None:
            return
        for group in self.groups:
            group.drop_dequantized()
        if len(indices) == self.batch_size:
            for tensor in self.slab.tensors:
                tensor.copy_(tensor.index_select(0, indices.to(tensor.device)))
        else:
            self.move_to_new_slab(self.max_tokens, indices)
        for group in self.groups:
            group.select_rows(indices)
        if self.pad_lengths is not None:
            self.pad_lengths = self.pad_lengths[indices.to(self.pad_lengths.device)]

    @override
    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UserError(
                f"crop({tokens_to_remove}) of a cache that has seen {self.cumulative_length} tokens: evicted entries "
                "cannot come back; decode without assisted or prompt-lookup generation"
            )

    @override
    def offload(self) -> None:
        raise UserError("a budgeted cache cannot be offloaded: it is small already; build it without offloading")

    prefetch = offload


def _group_heads(budget: LayerBudget, key_channels: tuple[str, ...] | None) -> list[GroupBudget]:
    heads_by_budget: dict[tuple[int, int, int], list[int]] = {}
    for head, head_budget in enumerate(zip(budget.tokens, budget.key_bits, budget.value_bits, strict=True)):
        heads_by_budget.setdefault(head_budget, []).append(head)
    return [
        GroupBudget(tuple(heads), *head_budget, key_channels and tuple(key_channels[head] for head in heads))
        for head_budget, heads in heads_by_budget.items()
    ]


def decode_rows(
    layers: Sequence[BudgetedLayer], query: QueryStates, key: KVStates, value: KVStates, params: AttentionParams
) -> QueryStates:
    """Do what `BudgetedLayer.attend` does with one new token of each sequence, one row each.

    They decode in one call if the kernel can take them all, else one by one.
    """
    tables = [layer.table for layer in layers if layer.table and layer.can_fuse(key)]
    if len(tables) < len(layers):
        outputs = []
        for layer, *row in zip(layers, query.split(1), key.split(1), value.split(1), strict=True):
            layer.pending_attend = True
            own_query, own_key, own_value = row
            outputs.append(layer.attend(own_query, own_key, own_value, None, params))
        return torch.cat(outputs)
    lengths = [layer.cumulative_length for layer in layers]
    for layer in layers:
        layer.advance(1)
    queries = split_gqa_groups(query, query.shape[1] // key.shape[1])
    return merge_gqa_groups(fused_step(tables, (queries, key, value), lengths, params))
