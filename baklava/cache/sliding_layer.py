"""The layers that slide: transformers' own, with their bytes really bounded."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer
from typing_extensions import override

from baklava.cache.storage import stored_dtype


class SlidingLayer(DynamicSlidingWindowLayer):
    """transformers' sliding-window layer, stored in 16 or 32 bits and without the prompt behind it.

    transformers keeps a view of the last tokens, which holds on to the bytes of the whole prompt until the next
    forward. Concatenation with new keys brings stored ones back to the dtype that the model computes in.
    """

    def __init__(self, window: int | None, bits: int) -> None:
        super().__init__(sliding_window=window)
        self.bits = bits

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = super().update(key_states, value_states, *args, **kwargs)
        self._store()
        return key.to(key_states.dtype), value.to(value_states.dtype)

    def _store(self) -> None:
        for name in ("keys", "values"):
            kept: Tensor = getattr(self, name)
            setattr(self, name, kept.to(stored_dtype(self.dtype, self.bits), copy=True))

    @property
    def num_entries(self) -> int:
        """Entries that a row holds for each of its KV heads."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held, over the whole batch."""
        held = [kept for kept in (self.keys, self.values) if kept is not None]
        return sum(kept.untyped_storage().nbytes() for kept in held)
