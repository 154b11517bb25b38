"""Sliding-window layers: transformers' own, with bounded memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer
from typing_extensions import override

from baklava.cache.storage import stored_dtype


@dataclass(frozen=True)
class LayerSnapshot:
    """What a layer without a budget holds after some tokens of a prompt."""

    tensors: dict[str, Tensor]
    num_tokens: int = 0


class SlidingLayer(DynamicSlidingWindowLayer):
    """transformers' sliding-window layer, stored in 16 or 32 bits and without the memory of the whole prompt.

    transformers keeps a view of the last tokens, which keeps the memory of the whole prompt alive until the next
    forward. Concatenation with new keys converts stored ones to the dtype that the model computes in. A token that is
    decoded attends to itself as it is stored, as in a layer with a budget.
    """

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, window: int | None, bits: int) -> None:
        super().__init__(sliding_window=window)
        self.bits = bits
        self.teacher_forced = False

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new, dtype = (key_states, value_states), stored_dtype(key_states.dtype, self.bits)
        is_decoded = self.teacher_forced or (key_states.shape[2] == 1 and self.cumulative_length > 0)
        if is_decoded:
            new = key_states.to(dtype), value_states.to(dtype)
        key, value = super().update(*(states.to(key_states.dtype) for states in new), *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys.to(dtype, copy=True), self.values.to(dtype, copy=True)
        return key.to(key_states.dtype), value.to(value_states.dtype)

    @contextmanager
    def teacher_forcing(self) -> Iterator[None]:
        """Let all tokens of a forward within this context attend to exactly what they would attend to one by one."""
        self.teacher_forced = True
        try:
            yield
        finally:
            self.teacher_forced = False

    def snapshot(self) -> LayerSnapshot:
        """Return what the layer holds after some tokens."""
        assert self.keys is not None
        assert self.values is not None
        return LayerSnapshot({"keys": self.keys, "values": self.values}, self.cumulative_length)

    def load(self, snapshot: LayerSnapshot) -> None:
        """Continue from a snapshot, with tensors of its own."""
        key, value = snapshot.tensors["keys"], snapshot.tensors["values"]
        self.lazy_initialization(key, value)
        dtype = stored_dtype(key.dtype, self.bits)
        self.keys, self.values = key.to(dtype, copy=True), value.to(dtype, copy=True)
        self.cumulative_length = snapshot.num_tokens

    def release(self) -> None:
        """Free the entries."""
        self.keys = self.values = None

    @property
    def num_entries(self) -> int:
        """KV entries of a row, for each of its KV heads."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes that the whole batch has allocated."""
        return sum(states.untyped_storage().nbytes() for states in (self.keys, self.values) if states is not None)
