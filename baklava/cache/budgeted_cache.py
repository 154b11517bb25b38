"""The cache that lives inside a plan: what goes into `model.generate(past_key_values=BudgetedCache(plan))`."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from typing_extensions import override

from baklava.cache import attention
from baklava.cache.budgeted_layer import BudgetedLayer, Padding
from baklava.cache.recording_layer import Recording
from baklava.cache.sliding_layer import SlidingLayer
from baklava.errors import UserError
from baklava.eviction import eviction_of
from baklava.plan.budget_plan import BudgetPlan


class BudgetedCache(Cache):
    """A KV cache with a budget for every (layer, KV head), for models that run attn_implementation="baklava".

    Each layer attends to its whole prompt and is then cut to its budget, so memory peaks at the plan plus one layer;
    where the plan says so, a prompt enters chunk by chunk. Lengths are logical: `get_seq_length()` counts the tokens
    seen. `room` is the most tokens that a sequence will have: a cache that knows it promises, and holds, less where
    these are fewer than a budget. What is evicted, and when, stays the same.
    """

    def __init__(self, plan: BudgetPlan, max_tokens: int | None = None) -> None:
        attention.register()
        self.plan, self.max_tokens, self._reserved_bytes = plan, max_tokens, plan.bytes_for(max_tokens)
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
        return BudgetedLayer(budget, self.eviction, plan.prefill.chunk, padding, channels, self.max_tokens)

    def copy(self, max_tokens: int | None = None) -> "BudgetedCache":
        """An independent cache that goes on from here, for a sequence of at most `room` tokens."""
        copied = copy.deepcopy(self, {id(shared): shared for shared in (self.plan, self.eviction)})
        copied.max_tokens, copied._reserved_bytes = max_tokens, self.plan.bytes_for(max_tokens)
        for layer in copied.budgeted_layers:
            layer.set_max_tokens(max_tokens)
        return copied

    @classmethod
    def from_recording(cls, plan: BudgetPlan, recording: Recording, max_tokens: int | None = None) -> "BudgetedCache":
        """The cache that a prefill of the recorded prompt leaves, for a sequence of at most `room` tokens.

        Raises:
            UserError: the plan's eviction method was not recorded, or the plan prefills in chunks.
        """
        if plan.prefill.mode != "dense":
            raise UserError(
                "the plan prefills in chunks, so its cache cannot be cut from a dense recording; prefill with it"
            )
        cache = cls(plan, max_tokens)
        layers = zip(cache.budgeted_layers, recording.keys, recording.values, recording.scores, strict=True)
        for layer, key, value, scores in layers:
            if cache.eviction.scored and cache.eviction.observation not in scores:
                raise UserError(f"{cache.eviction} was not observed in the prefill; prefill with this eviction method")
            layer.load_prompt(key, value, scores.get(cache.eviction.observation))
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
        groups = [group for layer in self.budgeted_layers for group in layer.groups]
        for layer in self.budgeted_layers:
            layer.teacher_forced = True
        try:
            with ExitStack() as stack:
                for group in groups:
                    stack.enter_context(group.dequantized())
                yield
        finally:
            for layer in self.budgeted_layers:
                layer.teacher_forced = False

    def unshare(self) -> None:
        """Hold copies of what is shared with the sequences that this one has decoded together with.

        Where one of them is dropped its memory is free once the others stand alone, or decode again.
        """
        for layer in self.budgeted_layers:
            for group in layer.groups:
                group.unshare()

    @property
    def budgeted_layers(self) -> list[BudgetedLayer]:
        """The budgeted layers, in order."""
        return [layer for layer in self.layers if isinstance(layer, BudgetedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes held now by the whole batch, as the allocator counts them."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def num_entries(self) -> int:
        """Entries that a row holds in its budgeted layers, over all (layer, KV head)."""
        return sum(layer.num_entries for layer in self.budgeted_layers)

    @property
    def num_slots(self) -> int:
        """Slots that a row holds, used or not; while it is the same, so are the bytes."""
        budgeted = sum(
            group.num_slots * len(group.budget.heads) for layer in self.budgeted_layers for group in layer.groups
        )
        return budgeted + sum(layer.num_entries for layer in self.layers if isinstance(layer, SlidingLayer))

    @property
    def reserved_bytes(self) -> int:
        """Most bytes that one sequence may hold between two forwards."""
        return self._reserved_bytes

    def cached_positions(self, layer: int, head: int, row: int = 0) -> Int[Tensor, " entries"]:
        """Positions that a KV head holds for a row, ascending, counted from the row's first real token."""
        budgeted_layers = self.layers[layer]
        if not isinstance(budgeted_layers, BudgetedLayer):
            raise UserError(f"layer {layer} slides and has no budget; ask for a full-attention layer")
        return budgeted_layers.cached_positions(head, row)

    def check_integrity(self) -> None:
        """Raise RuntimeError when a head holds more than its budget, or the cache more bytes than promised."""
        self._check_attended()
        for index, layer in enumerate(self.budgeted_layers):
            for group in layer.groups:
                held = group.cached_positions()
                if group.num_slots > group.max_slots or int((held >= 0).sum(-1).max()) > group.max_slots:
                    raise RuntimeError(f"layer {index} holds more than {group.max_slots} entries: {held.shape[2]}")
        batch = next((layer.batch_size for layer in self.budgeted_layers if layer.groups), 1)
        if self.nbytes > self.reserved_bytes * batch:
            raise RuntimeError(f"the cache holds {self.nbytes} bytes, {self.reserved_bytes * batch} were promised")

    def _check_attended(self) -> None:
        pending_attend = [index for index, layer in enumerate(self.layers) if getattr(layer, "waiting", False)]
        if pending_attend:
            raise UserError(
                f"the keys of layer {pending_attend[0]} never reached baklava's attention, so the budget would be ignored: "
                'load the model with attn_implementation="baklava"; a model that changes keys after the cache, as '
                "latent attention does, is not supported"
            )
