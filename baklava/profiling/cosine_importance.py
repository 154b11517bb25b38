"""Importance of every head: the cosine between its input and its output (BaKlaVa, arXiv 2502.13176)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module, ModuleList
from torch.nn.functional import cosine_similarity

from baklava.cache import attention
from baklava.errors import UserError
from baklava.profiling.profile import ImportanceSource
from baklava.runtime.model_loader import LoadedModel


class CosineImportance:
    """Accumulates cosine similarities while a model runs inside `measuring`."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        layers = range(loaded.geometry.layers)
        self._by_head: dict[ImportanceSource, list[list[Tensor]]] = {
            source: [[] for _ in layers] for source in get_args(ImportanceSource)
        }
        self._by_layer: list[list[Tensor]] = [[] for _ in layers]
        self._inputs: dict[int, Tensor | None] = {}
        self._attended: set[int] = set()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure the forwards in this context; hooks are removed at its end."""
        hooks = [hook for block, attends in _attention_modules(self.loaded) for hook in self._add_hooks(block, attends)]
        try:
            with attention.attention_hook(self._on_attention):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self._inputs.clear()

    def head_similarity(self) -> dict[ImportanceSource, list[Float[Tensor, " query_heads"]]]:
        """Return the mean similarity per source, layer and query head; empty if a layer does not attend."""
        measured = {source: layers for source, layers in self._by_head.items() if any(layers)}
        return {
            source: [_mean(layer) if layer else torch.empty(0) for layer in layers]
            for source, layers in measured.items()
        }

    def layer_similarity(self) -> Float[Tensor, " layers"]:
        """Return the mean similarity of the hidden state before and after attention, per layer; 0 if it is unknown."""
        return torch.stack(
            [_mean(layer) if layer else torch.zeros((), dtype=torch.float64) for layer in self._by_layer]
        )

    def _add_hooks(self, block: Module, attends: Module) -> list[Any]:
        """Measure a module that may attend, within the block that adds its output to the hidden state."""
        residual: dict[str, Tensor] = {}
        index = int(attends.layer_idx)  # type: ignore[arg-type]

        def before_block(module: Any, args: Any, kwargs: Any) -> None:
            residual["before"] = args[0] if args else kwargs["hidden_states"]

        def before_attention(module: Any, args: Any, kwargs: Any) -> None:
            self._attended.discard(id(attends))
            self._inputs[id(attends)] = args[0] if args else kwargs.get("hidden_states")

        def measure(after: Tensor) -> None:
            if id(attends) in self._attended and after.shape == residual["before"].shape:
                self._by_layer[index].append(cosine_similarity(residual["before"], after, dim=-1).flatten().double())

        hooks = [
            block.register_forward_pre_hook(before_block, with_kwargs=True),
            attends.register_forward_pre_hook(before_attention, with_kwargs=True),
        ]
        norm = _norm_after_attention(block)

        def after_attention(module: Any, args: Any, output: Any) -> None:
            residual["sum"] = residual["before"]
            if id(attends) in self._attended:
                residual["sum"] = residual["before"] + (output[0] if isinstance(output, tuple) else output)
            if norm is None:
                measure(residual["sum"])

        def before_norm(module: Any, args: Any) -> None:
            # In a parallel block, the norm reads what attention reads.
            measure(residual["sum"] if args[0] is residual["before"] else args[0])

        hooks.append(attends.register_forward_hook(after_attention))
        return hooks if norm is None else [*hooks, norm.register_forward_pre_hook(before_norm)]

    def _on_attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, output: Tensor, params: attention.AttentionParams
    ) -> None:
        index = getattr(module, "layer_idx", None)
        if index is None:
            raise UserError(
                f"several layers of {self.loaded.identity.id} share {type(module).__name__}, which does not know in "
                "which it is, so they cannot be profiled; choose a plan that needs no profile"
            )
        heads, group = output.shape[2], output.shape[2] // key.shape[1]
        inputs: dict[ImportanceSource, Tensor] = {
            "value": value.repeat_interleave(group, 1),
            "key": key.repeat_interleave(group, 1),
            "query": query,
        }
        self._attended.add(id(module))
        hidden = self._inputs.get(id(module))
        if hidden is not None and hidden.shape[-1] == heads * output.shape[3]:
            inputs["hidden"] = hidden.view(*hidden.shape[:2], heads, -1).transpose(1, 2)
        for source, head_input in inputs.items():
            if head_input.shape != output.transpose(1, 2).shape:
                continue
            similarity = cosine_similarity(head_input, output.transpose(1, 2), dim=-1)
            self._by_head[source][index].append(similarity.transpose(0, 1).flatten(1).double())


def _attention_modules(loaded: LoadedModel) -> list[tuple[Module, Module]]:
    """Return the modules of the decoder that know their layer's index, each after the block that contains it."""
    named = [
        (name, module)
        for name, module in loaded.model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    ]
    pairs = [(loaded.model.get_submodule(name.rpartition(".")[0]), module) for name, module in named]
    return [(block, module) for block, module in pairs if not isinstance(block, ModuleList)]


def _norm_after_attention(block: Any) -> Any:
    """Return the first module that reads the residual stream after attention, or None if it has another name.

    Olmo2's `post_attention_layernorm` reads the attention output before it is added.
    """
    if hasattr(block, "pre_feedforward_layernorm"):
        return block.pre_feedforward_layernorm
    if hasattr(block, "post_attention_layernorm") and not hasattr(block, "post_feedforward_layernorm"):
        return block.post_attention_layernorm
    return None


def _mean(parts: list[Tensor]) -> Tensor:
    """Return the mean over tokens and windows, on the host, since layers may lie on several devices."""
    return torch.cat(parts, -1).mean(-1).cpu()
