"""Find out how each attention layer of a model rotates its queries, by looking at what it does.

Models differ in the frequencies, the layout and the number of the channels that are rotated, some from layer to layer,
and say so in different places. One token alone attends to itself, so its position changes nothing but this rotation.
"""

import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from baklava.cache.attention import attention_hook, register_rotary_shift
from baklava.cache.rotary_shift import RotaryShift

PROBE_POSITION = 48
"""A position at which the usual frequencies differ; models have more positions than that."""

logger = logging.getLogger(__name__)

TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Relative error that is rounding, by the dtype of queries."""

TOLERANCE_16_BITS = 0.04


@torch.no_grad()
def probe_rotary_shifts(model: Any, token: int) -> None:
    """Register the RoPE of each attention layer with baklava's attention; a layer that is not understood gets none.

    Args:
        model: A transformers model that attends through baklava.
        token: A token with an embedding.
    """
    device = model.device
    if device.type == "meta" or "position_ids" not in inspect.signature(model.forward).parameters:
        return
    seen: dict[Module, Tensor] = {}

    def keep_query(module: Module, query: Tensor, *_: Any) -> None:
        seen[module] = query[:, :, 0].float().cpu()

    ids, positions = torch.tensor([[token], [token]], device=device), torch.tensor([[0], [PROBE_POSITION]])
    try:
        with attention_hook(keep_query):
            model(input_ids=ids, position_ids=positions.to(device), use_cache=False)
    except Exception:  # of a model that cannot be budgeted; its first forward says why
        logger.debug("the model does not run on one token without a cache", exc_info=True)
        return
    candidates = list(_candidates(model))
    tolerance = TOLERANCES.get(model.dtype, TOLERANCE_16_BITS)
    for module, (start, moved) in seen.items():
        errors = [_error(shift, start, moved) for shift in candidates]
        best = min(range(len(errors)), key=errors.__getitem__)
        register_rotary_shift(module, candidates[best] if errors[best] <= tolerance else None)


def _candidates(model: Any) -> Iterator[RotaryShift]:
    """Yield no rotation, and both layouts of all frequencies that the model has."""
    yield RotaryShift(torch.empty(0, dtype=torch.float64))
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
            frequencies = buffer.detach().double().cpu().clone()
            yield RotaryShift(frequencies)
            yield RotaryShift(frequencies, interleaved=True)


def _error(shift: RotaryShift, start: Tensor, moved: Tensor) -> float:
    """Return how far a query at the first position, shifted, is from that at the other, relative to its length."""
    if 2 * len(shift.frequencies) > start.shape[-1] or not bool(start.any()):
        return float("inf")
    shifted = shift.shift(start[None], torch.full((1, len(start)), PROBE_POSITION))[0]
    return float((shifted - moved).norm() / start.norm())
