"""Folding entries that leave into those that stay, so that not all of what they held is lost."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from baklava.attention import Heads

BLOCK = 256
"""Leaving entries at a time: their similarities take block x staying entries per head."""


@dataclass(frozen=True)
class Merged:
    """The entries that stay, and which of them took others in."""

    key: Heads
    value: Heads
    changed: Bool[Tensor, "batch heads entries"]


def merged(
    key: Heads,
    value: Heads,
    positions: Int[Tensor, "batch heads all"],
    stays: Int[Tensor, "batch heads stay"],
    sinks: int,
    threshold: float,
) -> Merged:
    """Fold what leaves into what stays, the slots in `stays`; sinks and padding take no part.

    An entry that leaves joins the staying one whose key k_c is most similar to its own, if their cosine u is at least
    the threshold. Key and value become (e x_c + sum exp(u_i) x_i) / (e + sum exp(u_i)) over those that join (D2O, arXiv
    2406.13035, section 3.3).
    """
    leaves = _others(stays, positions.shape[2])
    kept_key, kept_value = (_at(each, stays).float() for each in (key, value))
    closed = (positions.gather(2, stays) < sinks) | (positions.gather(2, stays) < 0)
    weight = torch.full_like(kept_key[..., 0], math.e)
    key_sum, value_sum = kept_key * math.e, kept_value * math.e
    directions = normalize(kept_key, dim=-1).transpose(2, 3)
    for part in _blocks(leaves):
        lost_key, lost_value = (_at(each, part).float() for each in (key, value))
        similarity = (normalize(lost_key, dim=-1) @ directions).masked_fill(closed[:, :, None], -torch.inf)
        best, target = similarity.max(-1)
        joins = (best >= threshold) & (positions.gather(2, part) >= 0)
        share = torch.where(joins, best.exp(), 0)
        weight.scatter_add_(2, target, share)
        wide = target[..., None].expand_as(lost_key)
        key_sum.scatter_add_(2, wide, lost_key * share[..., None])
        value_sum.scatter_add_(2, wide, lost_value * share[..., None])
    changed = weight > math.e * (1 + 1e-6)
    new_key, new_value = ((total / weight[..., None]).to(key.dtype) for total in (key_sum, value_sum))
    return Merged(new_key, new_value, changed)


def _at(entries: Heads, slots: Tensor) -> Float[Tensor, "batch heads slots head_dim"]:
    return entries.gather(2, slots[..., None].expand(*slots.shape, entries.shape[3]))


def _others(stays: Tensor, entries: int) -> Int[Tensor, "batch heads leave"]:
    """All slots but these."""
    mask = torch.zeros(*stays.shape[:2], entries, dtype=torch.int8, device=stays.device).scatter_(2, stays, 1)
    return mask.argsort(dim=2, stable=True)[..., : entries - stays.shape[2]]


def _blocks(slots: Tensor) -> Iterator[Tensor]:
    for start in range(0, slots.shape[2], BLOCK):
        yield slots[..., start : start + BLOCK]
