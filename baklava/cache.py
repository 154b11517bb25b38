"""The cache that lives inside a plan: what goes into `model.generate(past_key_values=BudgetedCache(plan))`."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from typing_extensions import override

from baklava import attention
from baklava.attention import Grouped, Heads, Kernel, Queries, grouped, ungrouped
from baklava.errors import UserError
from baklava.eviction import Eviction, eviction_of
from baklava.heads import Budget, HeadGroup, Tokens, head_group
from baklava.padding import Padding
from baklava.plan import BudgetPlan, LayerBudget
from baklava.recording import Recording
from baklava.sliding import SlidingLayer


class RaggedLayer(CacheLayerMixin):
    """A layer whose KV heads hold different numbers of entries, grouped by equal budgets."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(
        self,
        budget: LayerBudget,
        eviction: Eviction,
        chunk: int | None = None,
        padding: Padding | None = None,
        channels: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        self.budgets, self.eviction, self.chunk = _groups(budget, channels), eviction, chunk
        self.padding = padding or Padding()
        self.groups: list[HeadGroup] = []
        self.seen = 0
        self.pads: Int[Tensor, " batch"] | None = None
        self.forced = False
        self.waiting = False

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.groups = [head_group(budget, self.eviction, key_states) for budget in self.budgets]
        self.is_initialized = True

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
        self.seen += tokens.count
        if self.chunk is None or tokens.count <= self.chunk:
            return ungrouped(self._attend(tokens, kernel))
        starts = range(0, tokens.count, self.chunk)
        parts = [tokens.part(start, min(start + self.chunk, tokens.count)) for start in starts]
        return ungrouped(torch.cat([self._attend(part, kernel) for part in parts], 3))

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

    def kept_positions(self, head: int, row: int) -> Int[Tensor, " entries"]:
        """Positions that a KV head holds for a row, ascending, counted from the row's first real token."""
        for group in self.groups:
            if head in group.budget.heads:
                kept = group.kept()
                kept = kept.expand(self._batch(), len(group.budget.heads), -1)[row, group.budget.heads.index(head)]
                return kept[kept >= 0].long().sort().values
        return torch.empty(0, dtype=torch.long)

    def get_seq_length(self) -> int:
        """Tokens seen, not entries held: positions and masks count from it."""
        return self.seen

    @override
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    @override
    def get_max_length(self) -> int:
        return -1

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


class BudgetedCache(Cache):
    """A KV cache with a budget for every (layer, KV head), for models that run attn_implementation="baklava".

    Each layer attends to its whole prompt and is then cut to its budget, so memory peaks at the plan plus one layer;
    where the plan says so, a prompt enters chunk by chunk. Lengths are logical: `get_seq_length()` counts the tokens
    seen.
    """

    def __init__(self, plan: BudgetPlan) -> None:
        attention.register()
        self.plan = plan
        self.eviction = eviction_of(plan.eviction)
        if self.eviction.sample.repeated and plan.prefill.mode != "dense":
            raise UserError(
                f"{plan.eviction.method} repeats whole prompts, not chunks; make a plan that prefills densely"
            )
        padding = Padding()
        super().__init__(layers=[self._layer(index, padding) for index in range(len(plan.layers))])

    def _layer(self, index: int, padding: Padding) -> CacheLayerMixin:
        plan = self.plan
        if (budget := plan.layers[index]) is None:
            return SlidingLayer(plan.geometry.windows[index], plan.sliding_bits)
        channels = plan.key_channels[index] if plan.key_channels else None
        return RaggedLayer(budget, self.eviction, plan.prefill.chunk, padding, channels)

    @classmethod
    def cut(cls, plan: BudgetPlan, recording: Recording) -> "BudgetedCache":
        """The cache that a prefill of the recorded prompt leaves.

        Raises:
            UserError: the plan's eviction method was not recorded, or the plan prefills in chunks.
        """
        if plan.prefill.mode != "dense":
            raise UserError(
                "the plan prefills in chunks, so its cache cannot be cut from a dense recording; prefill with it"
            )
        cache = cls(plan)
        layers = zip(cache.ragged(), recording.keys, recording.values, recording.scores, strict=True)
        for layer, key, value, scores in layers:
            if cache.eviction.scored and cache.eviction.observation not in scores:
                raise UserError(f"{cache.eviction} was not observed in the prefill; prefill with this eviction method")
            layer.fill(key, value, scores.get(cache.eviction.observation))
        return cache

    @override
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self._check_attended()
        if key_states.shape[1::2] != (self.plan.geometry.kv_heads, self.plan.geometry.head_dim):
            raise UserError(
                f"keys of shape {tuple(key_states.shape)} for a plan of {self.plan.geometry.kv_heads} KV heads of "
                f"dimension {self.plan.geometry.head_dim}; use the plan with the model it was made for"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @contextmanager
    def teacher_forcing(self) -> Iterator[None]:
        """Within it, all tokens of a forward see exactly what they would see one by one."""
        groups = [group for layer in self.ragged() for group in layer.groups]
        for layer in self.ragged():
            layer.forced = True
        try:
            with ExitStack() as stack:
                for group in groups:
                    stack.enter_context(group.mirrored())
                yield
        finally:
            for layer in self.ragged():
                layer.forced = False

    def ragged(self) -> list[RaggedLayer]:
        """The budgeted layers, in order."""
        return [layer for layer in self.layers if isinstance(layer, RaggedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes held now by the whole batch, as the allocator counts them."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def promised_bytes(self) -> int:
        """Most bytes that one sequence may hold between two forwards."""
        return self.plan.bytes_per_sequence

    def kept_positions(self, layer: int, head: int, row: int = 0) -> Int[Tensor, " entries"]:
        """Positions that a KV head holds for a row, ascending, counted from the row's first real token."""
        ragged = self.layers[layer]
        if not isinstance(ragged, RaggedLayer):
            raise UserError(f"layer {layer} slides and has no budget; ask for a full-attention layer")
        return ragged.kept_positions(head, row)

    def check_integrity(self) -> None:
        """Raise RuntimeError when a head holds more than its budget, or the cache more bytes than promised."""
        self._check_attended()
        for index, layer in enumerate(self.ragged()):
            for group in layer.groups:
                held = group.kept()
                if group.size > group.budget.tokens or int((held >= 0).sum(-1).max()) > group.budget.tokens:
                    raise RuntimeError(f"layer {index} holds more than {group.budget.tokens} entries: {held.shape[2]}")
        batch = next((layer._batch() for layer in self.ragged() if layer.groups), 1)
        if self.nbytes > self.promised_bytes * batch:
            raise RuntimeError(f"the cache holds {self.nbytes} bytes, {self.promised_bytes * batch} were promised")

    def _check_attended(self) -> None:
        waiting = [index for index, layer in enumerate(self.layers) if getattr(layer, "waiting", False)]
        if waiting:
            raise UserError(
                f"the keys of layer {waiting[0]} never reached baklava's attention, so the budget would be ignored: "
                'load the model with attn_implementation="baklava"; a model that changes keys after the cache, as '
                "latent attention does, is not supported"
            )


def _groups(budget: LayerBudget, channels: tuple[str, ...] | None) -> list[Budget]:
    shapes = list(zip(budget.tokens, budget.key_bits, budget.value_bits, strict=True))
    members = {shape: tuple(head for head, other in enumerate(shapes) if other == shape) for shape in shapes}
    return [
        Budget(heads, *shape, channels and tuple(channels[head] for head in heads)) for shape, heads in members.items()
    ]
