"""Importance of every head: the cosine between its input and its output (BaKlaVa, arXiv 2502.13176)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor
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
        self._hidden: dict[int, Tensor] = {}

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure the forwards in this context; hooks are removed at its end."""
        hooks = [
            hook for index, layer in enumerate(_decoder_layers(self.loaded)) for hook in self._add_hooks(index, layer)
        ]
        try:
            with attention.attention_hook(self._on_attention):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def head_similarity(self) -> dict[ImportanceSource, Float[Tensor, "layers query_heads"]]:
        """Return the mean similarity per source, layer and query head."""
        measured = {source: layers for source, layers in self._by_head.items() if layers[0]}
        return {source: torch.stack([_mean(layer) for layer in layers]) for source, layers in measured.items()}

    def layer_similarity(self) -> Float[Tensor, " layers"]:
        """Return the mean similarity of the hidden state before and after attention, per layer."""
        return torch.stack([_mean(layer) for layer in self._by_layer])

    def _add_hooks(self, index: int, layer: Any) -> list[Any]:
        residual: dict[str, Tensor] = {}

        def before_layer(module: Any, args: Any, kwargs: Any) -> None:
            residual["before"] = args[0] if args else kwargs["hidden_states"]

        def before_attention(module: Any, args: Any, kwargs: Any) -> None:
            self._hidden[index] = args[0] if args else kwargs["hidden_states"]

        def after_attention(module: Any, args: Any) -> None:
            self._by_layer[index].append(cosine_similarity(residual["before"], args[0], dim=-1).flatten().double())

        return [
            layer.register_forward_pre_hook(before_layer, with_kwargs=True),
            layer.self_attn.register_forward_pre_hook(before_attention, with_kwargs=True),
            _norm_after_attention(layer).register_forward_pre_hook(after_attention),
        ]

    def _on_attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, output: Tensor, params: attention.AttentionParams
    ) -> None:
        heads, group = output.shape[2], output.shape[2] // key.shape[1]
        inputs: dict[ImportanceSource, Tensor] = {
            "value": value.repeat_interleave(group, 1),
            "key": key.repeat_interleave(group, 1),
            "query": query,
        }
        hidden = self._hidden[module.layer_idx]
        if hidden.shape[-1] == heads * output.shape[3]:
            inputs["hidden"] = hidden.view(*hidden.shape[:2], heads, -1).transpose(1, 2)
        for source, head_input in inputs.items():
            similarity = cosine_similarity(head_input, output.transpose(1, 2), dim=-1)
            self._by_head[source][module.layer_idx].append(similarity.transpose(0, 1).flatten(1).double())


def _decoder_layers(loaded: LoadedModel) -> list[Any]:
    layers = [module for module in loaded.model.modules() if hasattr(module, "self_attn")]
    if len(layers) != loaded.geometry.layers or not all(hasattr(layer.self_attn, "layer_idx") for layer in layers):
        raise UserError(
            f"{loaded.identity.id} has {len(layers)} layers with self_attn, not {loaded.geometry.layers}, so it "
            "cannot be profiled; choose a Llama-type decoder"
        )
    return layers


def _norm_after_attention(layer: Any) -> Any:
    """Return the first module that reads the residual stream after attention.

    Raises:
        UserError: there is none; Olmo2's `post_attention_layernorm` reads the attention output before it is added.
    """
    if hasattr(layer, "pre_feedforward_layernorm"):
        return layer.pre_feedforward_layernorm
    if hasattr(layer, "post_attention_layernorm") and not hasattr(layer, "post_feedforward_layernorm"):
        return layer.post_attention_layernorm
    raise UserError(
        f"{type(layer).__name__} has no norm of the hidden state after attention, so layer importance cannot be "
        "measured; choose a Llama-type decoder"
    )


def _mean(parts: list[Tensor]) -> Tensor:
    """Return the mean over tokens and windows, on the host, since layers may lie on several devices."""
    return torch.cat(parts, -1).mean(-1).cpu()
