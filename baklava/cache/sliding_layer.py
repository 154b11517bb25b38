"""Sliding-window layers: transformers' own, with bounded memory."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer
from typing_extensions import override

from baklava.cache.storage import stored_dtype


class SlidingLayer(DynamicSlidingWindowLayer):
    """transformers' sliding-window layer, stored in 16 or 32 bits and without the memory of the whole prompt.

    transformers keeps a view of the last tokens, which keeps the memory of the whole prompt alive until the next
    forward. Concatenation with new keys converts stored ones to the dtype that the model computes in.
    """

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, window: int | None, bits: int) -> None:
        super().__init__(sliding_window=window)
        self.bits = bits

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = super().update(key_states, value_states, *args, **kwargs)
        dtype = stored_dtype(self.dtype, self.bits)
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys.to(dtype, copy=True), self.values.to(dtype, copy=True)
        return key.to(key_states.dtype), value.to(value_states.dtype)

    @property
    def num_entries(self) -> int:
        """KV entries of a row, for each of its KV heads."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes that the whole batch has allocated."""
        return sum(states.untyped_storage().nbytes() for states in (self.keys, self.values) if states is not None)
