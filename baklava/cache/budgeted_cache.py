"""The KV cache that stays within a plan, for `model.generate(past_key_values=BudgetedCache(plan))`."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from baklava.cache import attention
from baklava.cache.budgeted_layer import BudgetedLayer, Padding
from baklava.cache.cache_file import read_tensors, write_tensors
from baklava.cache.recording_layer import Recording
from baklava.cache.score_predictor import ScorePredictor
from baklava.cache.sliding_layer import LayerSnapshot, SlidingLayer
from baklava.cache.state_layer import NoAttentionLayer, StatefulCache, new_states, unbudgeted_layer
from baklava.errors import UserError
from baklava.eviction import build_eviction
from baklava.plan.budget_plan import BudgetPlan


class BudgetedCache(StatefulCache):
    """A KV cache with a budget for every (layer, KV head), for models with attn_implementation="baklava".

    Each layer attends to its whole prompt and then compresses it to its budget, so memory peaks at the plan plus one
    layer. If the plan says so, a prompt is processed in chunks. `get_seq_length()` counts the tokens seen, whether or
    not they are still cached.

    Args:
        plan: The budgets, the eviction method and the bits.
        max_tokens: The largest number of tokens that a sequence will have. Budgets above it reserve and allocate less;
            what is evicted, and when, does not change.
    """

    def __init__(self, plan: BudgetPlan, max_tokens: int | None = None) -> None:
        attention.register()
        self.plan, self.max_tokens, self._reserved_bytes = plan, max_tokens, plan.bytes_for(max_tokens)
        self.eviction = build_eviction(plan.eviction)
        if self.eviction.query_sample.uses_repetition and plan.prefill.mode != "dense":
            raise UserError(
                f"{plan.eviction.method} repeats whole prompts, not chunks; make a plan that prefills densely"
            )
        if bool(self.eviction.predicted_share) != (plan.score_predictors is not None):
            found = "has some" if plan.score_predictors else "has none"
            raise UserError(
                f"score predictors go with methods that predict, and the plan of {plan.eviction.method} {found}; "
                "give the unchanged plan.json of a search"
            )
        self._last_updated = 0
        padding = Padding()
        layers = [self._layer(index, padding) for index in range(len(plan.layers))]
        super().__init__(layers, new_states(plan.geometry))

    def _layer(self, index: int, padding: Padding) -> BudgetedLayer | SlidingLayer | NoAttentionLayer:
        plan = self.plan
        if (budget := plan.layers[index]) is None:
            return unbudgeted_layer(plan.geometry.windows[index] or 0, plan.sliding_bits)
        channels = plan.key_channels[index] if plan.key_channels else None
        heads = plan.score_predictors[index] if plan.score_predictors else None
        predictor = ScorePredictor.decode(heads) if heads else None
        return BudgetedLayer(
            budget,
            self.eviction,
            plan.prefill.chunk_size,
            padding,
            channels,
            self.max_tokens,
            predictor,
            num_sharing=plan.geometry.shared_layers.count(index),
        )

    def copy(self, max_tokens: int | None = None) -> "BudgetedCache":
        """Return an independent cache that continues from here, for a sequence of at most `max_tokens` tokens."""
        memo: dict[int, Any] = {id(shared): shared for shared in (self.plan, self.eviction)}
        copied = BudgetedCache(self.plan, max_tokens)
        copied._last_updated = self._last_updated
        copied.layers = [
            layer.copy(max_tokens, memo) if isinstance(layer, BudgetedLayer) else copy.deepcopy(layer, memo)
            for layer in self.layers
        ]
        for index, state in self.states.items():
            copied.states[index].load(state.snapshot())
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "BudgetedCache":
        """Return `copy` for sequences of the same length."""
        return self.copy(self.max_tokens)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Refuse to be pickled: each tensor would take the memory of all."""
        raise UserError("a budgeted cache cannot be pickled; write it with its save(path) instead")

    def save(self, path: Path | str) -> None:
        """Write the cache into a safetensors file, from which `load` continues under the same plan.

        Raises:
            UserError: nothing has been cached yet, or the file cannot be written.
        """
        layers = {f"layers.{index}": layer.snapshot() for index, layer in enumerate(self.budgeted_layers)}
        sliding = {
            index: layer.snapshot() for index, layer in enumerate(self.layers) if isinstance(layer, SlidingLayer)
        }
        if not all(layers.values()):
            raise UserError("the cache is empty, so there is nothing to save; prefill a prompt first")
        layers |= {f"sliding.{index}": snapshot.tensors for index, snapshot in sliding.items()}
        layers |= {f"states.{index}": state.snapshot().tensors for index, state in self.states.items()}
        first = self.budgeted_layers[0]
        metadata = {
            "plan": self.plan.digest,
            "model": self.plan.model.id,
            "max_tokens": "" if self.max_tokens is None else str(self.max_tokens),
            "num_tokens": str(self.get_seq_length()),
            "batch": str(first.batch_size),
            "dtype": str(first.dtype).removeprefix("torch."),
        }
        tensors = {f"{layer}.{name}": tensor for layer, named in layers.items() for name, tensor in named.items()}
        write_tensors(Path(path), tensors, metadata)

    @classmethod
    def load(cls, path: Path | str, plan: BudgetPlan, device: torch.device | str = "cpu") -> "BudgetedCache":
        """Return the cache that `save` has written; it continues as the saved one would have.

        Args:
            path: The file.
            plan: The plan of the saved cache.
            device: Where the model is.

        Raises:
            UserError: the file cannot be read, is damaged, or was saved under another plan.
        """
        tensors, metadata = read_tensors(Path(path))
        if metadata["plan"] != plan.digest:
            raise UserError(
                f"{path} was saved under the plan {metadata['plan']} of {metadata['model']}, not under {plan.digest}; "
                "give the plan that it was made with"
            )
        layers: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, index, rest = name.split(".", 2)
            layers.setdefault(f"{kind}.{index}", {})[rest] = tensor.to(device)
        cache = cls(plan, int(metadata["max_tokens"]) if metadata["max_tokens"] else None)
        shape = int(metadata["batch"]), plan.geometry.kv_heads, 1, plan.geometry.head_dim
        template = torch.empty(shape, dtype=getattr(torch, metadata["dtype"]), device=device)
        try:
            cache._restore(layers, template, int(metadata["num_tokens"]))
        except (KeyError, ValueError) as error:
            raise UserError(f"{path} does not fit its plan ({error}); prefill the prompt again") from None
        return cache

    def _restore(self, layers: Mapping[str, Mapping[str, Tensor]], template: Tensor, num_tokens: int) -> None:
        """Let every layer continue from what was saved of it."""
        for number, layer in enumerate(self.budgeted_layers):
            layer.restore(layers[f"layers.{number}"], template)
        for index, sliding in enumerate(self.layers):
            if isinstance(sliding, SlidingLayer):
                sliding.load(LayerSnapshot(dict(layers[f"sliding.{index}"]), num_tokens))
        for index, state in self.states.items():
            state.load(LayerSnapshot(dict(layers[f"states.{index}"])))

    @classmethod
    def from_recording(cls, plan: BudgetPlan, recording: Recording, max_tokens: int | None = None) -> "BudgetedCache":
        """Return the cache that a prefill of the recorded prompt would give.

        Raises:
            UserError: the plan's eviction method was not recorded, or the plan prefills in chunks.
        """
        if plan.prefill.mode != "dense":
            raise UserError(
                "the plan prefills in chunks, so its cache cannot be made from a dense recording; prefill with the plan"
            )
        cache = cls(plan, max_tokens)
        recording.load_unbudgeted(cache)
        eviction = cache.eviction
        references = recording.references or ({},) * len(recording.keys)
        rotations = recording.rotary_shifts or (None,) * len(recording.keys)
        states = recording.keys, recording.values, recording.scores
        layers = zip(cache.budgeted_layers, *states, references, rotations, strict=True)
        for layer, key, value, scores, by_fit, rotary in layers:
            is_missing = eviction.fit_references and eviction.reference_key not in by_fit
            if eviction.scored and (is_missing or eviction.score_key not in scores):
                raise UserError(f"{eviction} was not observed in the prefill; prefill with this eviction method")
            layer.load_prompt(key, value, scores.get(eviction.score_key), by_fit.get(eviction.reference_key), rotary)
        return cache

    @override
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self._check_attended(self._last_updated)
        kv_heads, head_dim = self.plan.geometry.head_shape(layer_idx)
        for states in (key_states, value_states):
            if states.shape[1::2] != (kv_heads, head_dim):
                raise UserError(
                    f"keys or values of shape {tuple(states.shape)} for a plan of {kv_heads} KV heads of dimension "
                    f"{head_dim}; use the plan with the model it was made for. A model that stores others than its "
                    "config says cannot be budgeted"
                )
        self._last_updated = layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @contextmanager
    def teacher_forcing(self) -> Iterator[None]:
        """Let all tokens of a forward within this context attend to exactly what they would attend to one by one."""
        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(layer.teacher_forcing())
            yield

    @property
    def budgeted_layers(self) -> list[BudgetedLayer]:
        """The layers with a budget, in order: those with full attention."""
        return [layer for layer in self.layers if isinstance(layer, BudgetedLayer)]

    @property
    def reserved_bytes(self) -> int:
        """Bytes of one sequence, however long it is; less if not all layers have seen a token."""
        return self._reserved_bytes

    @property
    def num_entries(self) -> int:
        """KV entries of a row, over all (layer, KV head) with a budget."""
        return sum(layer.num_entries for layer in self.budgeted_layers)

    def cached_positions(self, layer: int, head: int, row: int = 0) -> Int[Tensor, " entries"]:
        """Return the positions that a KV head caches for a row, ascending, counted from the row's first real token."""
        budgeted = self.layers[layer]
        if not isinstance(budgeted, BudgetedLayer):
            raise UserError(f"layer {layer} has no budget; choose a layer with full attention")
        return budgeted.cached_positions(head, row)

    def check_integrity(self, num_tokens: int) -> None:
        """Check that the cache has seen a text, and that it is within its plan.

        Args:
            num_tokens: Tokens that the model has processed, with padding. After `generate` these are all but the last
                one, which is never fed: `output.shape[1] - 1`.

        Raises:
            UserError: keys of a layer never reached baklava's attention.
            RuntimeError: the cache has seen more or fewer tokens, a head has more entries than its budget, or the cache
                more bytes than it has reserved.
        """
        for index, layer in enumerate(self.layers):
            self._check_attended(index)
            if isinstance(layer, BudgetedLayer) and layer.pending_shared:
                raise RuntimeError(
                    f"{layer.pending_shared} layers that share the keys of layer {index} have not read them"
                )
            if not isinstance(layer, NoAttentionLayer) and layer.get_seq_length() != num_tokens:
                raise RuntimeError(
                    f"layer {index} of the cache has seen {layer.get_seq_length()} tokens of {num_tokens}, so the plan "
                    "was not applied"
                )
        if unseen := [index for index in self.states if not self.has_previous_state(index)]:
            raise RuntimeError(f"the states of the layers {unseen} have seen no token")
        for index, layer in enumerate(self.budgeted_layers):
            for group in layer.groups:
                positions = group.cached_positions()
                if int((positions >= 0).sum(-1).max()) > group.num_slots:
                    raise RuntimeError(f"layer {index} has more than {group.num_slots} entries: {positions.shape[2]}")
        batch = next((layer.batch_size for layer in self.budgeted_layers if layer.groups), 1)
        if self.nbytes > self.reserved_bytes * batch:
            raise RuntimeError(f"the cache has {self.nbytes} bytes, but reserved {self.reserved_bytes * batch}")

    def _check_attended(self, index: int) -> None:
        layer = self.layers[index]
        if isinstance(layer, BudgetedLayer) and layer.pending_attend:
            raise UserError(
                f"the keys of layer {index} never reached baklava's attention, so the budget would be ignored: load "
                'the model with attn_implementation="baklava"; a model that changes keys after the cache, as latent '
                "attention does, is not supported"
            )
