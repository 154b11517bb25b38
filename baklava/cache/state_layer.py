"""Layers whose memory does not grow: recurrent and convolution states, and layers without a cache."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DummyLayer, LinearAttentionLayer
from typing_extensions import override

from baklava.cache.sliding_layer import LayerSnapshot, SlidingLayer
from baklava.errors import UserError
from baklava.plan.geometry import CacheGeometry


class StateLayer(LinearAttentionLayer):
    """transformers' convolution and recurrent states of a layer, which change in place."""

    @override
    def lazy_initialization(
        self,
        conv_states: Tensor | None = None,
        recurrent_states: Tensor | None = None,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> None:
        if conv_states is not None:
            size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            self.conv_kernel_size[state_idx] = size
            self.conv_states[state_idx] = _zeros((*conv_states.shape[:-1], size), conv_states)
            self.is_conv_states_initialized[state_idx] = True
        if recurrent_states is not None:
            self.recurrent_states[state_idx] = _zeros(recurrent_states.shape, recurrent_states)
            self.is_recurrent_states_initialized[state_idx] = True

    @override
    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return super().update_recurrent_state(recurrent_states, state_idx, **kwargs)
        # A backward pass still needs the state before.
        self.recurrent_states[state_idx] = recurrent_states.clone()
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states

    def snapshot(self) -> LayerSnapshot:
        """Return the states."""
        return LayerSnapshot(dict(self._named_states()))

    def load(self, snapshot: LayerSnapshot) -> None:
        """Continue from a snapshot, with tensors of its own."""
        for name, states in snapshot.tensors.items():
            kind, _, index = name.partition(" ")
            state_idx = int(index)
            with torch.no_grad():
                if kind == "conv":
                    self.lazy_initialization(conv_states=states, state_idx=state_idx)
                    self.conv_states[state_idx].copy_(states)
                else:
                    self.lazy_initialization(recurrent_states=states, state_idx=state_idx)
                    self.recurrent_states[state_idx].copy_(states)
            self.has_previous_state[state_idx] = True

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        snapshot = self.snapshot()
        self.load(
            LayerSnapshot({name: at.index_select(0, rows.to(at.device)) for name, at in snapshot.tensors.items()})
        )

    @override
    def reset(self) -> None:
        self.__init__(self.number_of_states)  # type: ignore[misc]

    def release(self) -> None:
        """Free the states."""
        self.reset()

    @property
    def nbytes(self) -> int:
        """Bytes that the whole batch has allocated."""
        return sum(states.untyped_storage().nbytes() for _, states in self._named_states())

    def _named_states(self) -> Iterator[tuple[str, Tensor]]:
        for kind, states in (("conv", self.conv_states), ("recurrent", self.recurrent_states)):
            for index, tensor in states.items():
                if tensor is not None:
                    yield f"{kind} {index}", tensor


@torch.inference_mode(mode=False)  # within it, they could only be changed within it
def _zeros(shape: Sequence[int], template: Tensor) -> Tensor:
    return torch.zeros(tuple(shape), dtype=template.dtype, device=template.device)


def stack_states(layers: Sequence[StateLayer]) -> StateLayer:
    """Return the states of several sequences as the rows of one batch."""
    snapshots = [layer.snapshot().tensors for layer in layers]
    stacked = StateLayer(layers[0].number_of_states)
    stacked.load(LayerSnapshot({name: torch.cat([each[name] for each in snapshots]) for name in snapshots[0]}))
    return stacked


def unstack_states(stacked: StateLayer, layers: Sequence[StateLayer]) -> None:
    """Write the rows of a batch back to the layers that `stack_states` has read."""
    rows = {name: states.split(1) for name, states in stacked.snapshot().tensors.items()}
    for row, layer in enumerate(layers):
        layer.load(LayerSnapshot({name: states[row] for name, states in rows.items()}))


class NoAttentionLayer(DummyLayer):
    """A layer without keys and values; it may have a state."""

    nbytes = num_entries = 0

    @contextmanager
    def teacher_forcing(self) -> Iterator[None]:
        """Do nothing."""
        yield


class StatefulCache(Cache):
    """A cache whose layers may have a state, in addition to keys and values or instead of them.

    Args:
        layers: The keys and values of each layer.
        states: The states of the layers that have one.
    """

    def __init__(self, layers: Iterable[Any], states: Mapping[int, StateLayer]) -> None:
        super().__init__(layers=list(layers))
        self.states = dict(states)

    @property
    @override
    def is_linear(self) -> list[bool]:
        """No layer mixes both: the states are apart."""
        return [False] * len(self.layers)

    @override
    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        layer = self.states[layer_idx]
        return layer.conv_states[state_idx] if layer.has_previous_state[state_idx] else None

    @override
    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        layer = self.states[layer_idx]
        return layer.recurrent_states[state_idx] if layer.has_previous_state[state_idx] else None

    @override
    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        return self.states[layer_idx].update_conv_state(conv_states, state_idx, **kwargs)

    @override
    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        return self.states[layer_idx].update_recurrent_state(recurrent_states, state_idx, **kwargs)

    @override
    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        layer = self.states[max(self.states) if layer_idx is None else layer_idx]
        return all(layer.has_previous_state.values()) if state_idx is None else layer.has_previous_state[state_idx]

    @override
    def reset(self) -> None:
        super().reset()
        for state in self.states.values():
            state.reset()

    @override
    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        for state in self.states.values():
            state.select(beam_idx)

    @override
    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for state in self.states.values():
            rows = next((len(states) for states in state.snapshot().tensors.values()), 0)
            state.select(torch.arange(rows).repeat_interleave(repeats))

    @override
    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        for state in self.states.values():
            state.select(indices)

    @override
    def activate_past_recording(self) -> None:
        raise UserError(
            "a budgeted cache takes no tokens back: evicted entries cannot come back; decode without assisted or "
            "prompt-lookup generation"
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the whole batch has allocated, as the allocator counts them."""
        return sum(layer.nbytes for layer in (*self.layers, *self.states.values()))


def unbudgeted_layer(window: int, sliding_bits: int) -> SlidingLayer | NoAttentionLayer:
    """Return the layer that keeps a window of this many tokens; none for 0."""
    return SlidingLayer(window, sliding_bits) if window else NoAttentionLayer()


def new_states(geometry: CacheGeometry) -> dict[int, StateLayer]:
    """Return an empty state for each layer that has one."""
    return {index: StateLayer(len(sizes)) for index, sizes in enumerate(geometry.states) if sizes}
