"""RoPE whose frequencies depend on the length of a forward, fixed to those of the model's maximum length."""

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import GenerationMixin


def max_length(config: Any) -> int:
    """Return the largest number of tokens for which the RoPE of a text config is made.

    Dynamic RoPE stretches `max_position_embeddings` by its factor.
    """
    ropes = config.rope_parameters if isinstance(getattr(config, "rope_parameters", None), dict) else {}
    ropes = [rope for rope in (ropes, *ropes.values()) if isinstance(rope, dict)]
    factors = [rope.get("factor") or 1.0 for rope in ropes if "dynamic" in str(rope.get("rope_type"))]
    return int(config.max_position_embeddings * max(factors, default=1.0))


def fix_rope_frequencies(model: Any, num_positions: int) -> None:
    """Let each position have one RoPE, whatever else is in the forward: the one of a text of `num_positions` tokens.

    transformers chooses the frequencies of `longrope` (Phi-3.5, Phi-4-mini, PhiMoE) and `dynamic` RoPE by the largest
    position of a forward. So rows of a batch would depend on each other, and a cache could mix keys of both kinds;
    Phi models throw a user's cache away instead. vLLM chooses by the model's maximum too.

    Args:
        model: A transformers model, which is changed.
        num_positions: Tokens of the longest text.
    """
    modules = [module for module in model.modules() if _depends_on_length(module)]
    for module in modules:
        module.register_forward_pre_hook(_AppendPosition(num_positions - 1), with_kwargs=True)
        module.register_forward_hook(_drop_last_position)
    if modules:
        # Phi's own drops the cache if a text grows past the length at which the frequencies would change.
        model.prepare_inputs_for_generation = MethodType(GenerationMixin.prepare_inputs_for_generation, model)


def _depends_on_length(module: Module) -> bool:
    rope_type = getattr(module, "rope_type", None)  # a dict if it differs between types of layers
    names = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(name == "longrope" or "dynamic" in str(name) for name in names)


class _AppendPosition:
    """A hook that appends the last position to those of a forward, from which the frequencies are chosen."""

    def __init__(self, position: int) -> None:
        self.position = position

    def __call__(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > 1:
            return (args[0], self._append(args[1]), *args[2:]), kwargs
        return args, kwargs | {"position_ids": self._append(kwargs["position_ids"])}

    def _append(self, position_ids: Tensor) -> Tensor:
        return torch.cat([position_ids, torch.full_like(position_ids[..., :1], self.position)], -1)


def _drop_last_position(module: Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cos, sin = output
    return cos[..., :-1, :], sin[..., :-1, :]
