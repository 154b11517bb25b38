"""Importance of every head, as the cosine between what enters it and what leaves it (BaKlaVa, arXiv 2502.13176)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from baklava.cache import attention
from baklava.errors import UserError
from baklava.profiling.profile import Source
from baklava.runtime.model_loader import LoadedModel


class Meter:
    """Collects cosine similarities while a model runs; what it hooks it lets go of again."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.by_head: dict[Source, list[list[Tensor]]] = {
            source: [[] for _ in range(loaded.geometry.layers)] for source in get_args(Source)
        }
        self.by_layer: list[list[Tensor]] = [[] for _ in range(loaded.geometry.layers)]
        self.hidden: dict[int, Tensor] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within it, forwards are measured."""
        hooks = [hook for index, layer in enumerate(_decoder_layers(self.loaded)) for hook in self._hook(index, layer)]
        try:
            with attention.attention_hook(self._watch):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def heads(self) -> dict[Source, Float[Tensor, "layers query_heads"]]:
        """Mean similarity per source, layer and query head."""
        measured = {source: grid for source, grid in self.by_head.items() if grid[0]}
        return {source: torch.stack([_mean(layer) for layer in grid]) for source, grid in measured.items()}

    def layers(self) -> Float[Tensor, " layers"]:
        """Mean similarity of the hidden state before and after attention, per layer."""
        return torch.stack([_mean(layer) for layer in self.by_layer])

    def _hook(self, index: int, layer: Any) -> list[Any]:
        before: dict[str, Tensor] = {}

        def enter(module: Any, args: Any, kwargs: Any) -> None:
            before["residual"] = args[0] if args else kwargs["hidden_states"]

        def attend(module: Any, args: Any, kwargs: Any) -> None:
            self.hidden[index] = args[0] if args else kwargs["hidden_states"]

        def leave(module: Any, args: Any) -> None:
            self.by_layer[index].append(cosine_similarity(before["residual"], args[0], dim=-1).flatten().double())

        return [
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.self_attn.register_forward_pre_hook(attend, with_kwargs=True),
            _norm_after_attention(layer).register_forward_pre_hook(leave),
        ]

    def _watch(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, output: Tensor, kernel: attention.AttentionParams
    ) -> None:
        heads, group = output.shape[2], output.shape[2] // key.shape[1]
        inputs: dict[Source, Tensor] = {
            "value": value.repeat_interleave(group, 1),
            "key": key.repeat_interleave(group, 1),
            "query": query,
        }
        hidden = self.hidden[module.layer_idx]
        if hidden.shape[-1] == heads * output.shape[3]:
            inputs["hidden"] = hidden.view(*hidden.shape[:2], heads, -1).transpose(1, 2)
        for source, entering in inputs.items():
            similarity = cosine_similarity(entering, output.transpose(1, 2), dim=-1)
            self.by_head[source][module.layer_idx].append(similarity.transpose(0, 1).flatten(1).double())


def _decoder_layers(loaded: LoadedModel) -> list[Any]:
    layers = [module for module in loaded.model.modules() if hasattr(module, "self_attn")]
    if len(layers) != loaded.geometry.layers or not all(hasattr(layer.self_attn, "layer_idx") for layer in layers):
        raise UserError(
            f"{loaded.identity.id} has {len(layers)} layers with self_attn, not {loaded.geometry.layers}, so it "
            "cannot be profiled; choose a Llama-type decoder"
        )
    return layers


def _norm_after_attention(layer: Any) -> Any:
    """The first module that reads the residual stream after attention.

    Raises:
        UserError: there is none; Olmo2's `post_attention_layernorm` reads what attention gives, before it is added.
    """
    if hasattr(layer, "pre_feedforward_layernorm"):
        return layer.pre_feedforward_layernorm
    if hasattr(layer, "post_attention_layernorm") and not hasattr(layer, "post_feedforward_layernorm"):
        return layer.post_attention_layernorm
    raise UserError(
        f"{type(layer).__name__} has no norm of the hidden state behind attention, so layer importance cannot be "
        "measured; choose a Llama-type decoder"
    )


def _mean(parts: list[Tensor]) -> Tensor:
    """Mean over tokens and windows, on the host, since layers may lie on several devices."""
    return torch.cat(parts, -1).mean(-1).cpu()
