"""The rotation that makes the channels of a head alike, so that few bits serve all of them."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """The signs of a rotation, which copies of a cache share."""

    signs: Float[Tensor, "head_dim head_dim"]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rotation":
        return self


@functools.cache
@torch.inference_mode(mode=False)
def hadamard(head_dim: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "head_dim head_dim"]:
    """Signs (1, -1, 0) of a Walsh-Hadamard rotation that is its own inverse, once for all who ask for it.

    Where the dimension is no power of two, the largest that divides it is the size of the blocks that are rotated.
    """
    block = head_dim & -head_dim
    signs = torch.ones(1, 1)
    while len(signs) < block:
        signs = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), signs)
    return torch.block_diag(*[signs] * (head_dim // block)).to(dtype=dtype, device=device)


def rotated(entries: Tensor, signs: Float[Tensor, "head_dim head_dim"]) -> Tensor:
    """Entries [..., head_dim] in rotated channels, or back: norms and products of two rotated ones stay.

    Signs are exact in any dtype, which the entries of an orthogonal matrix are not: rounded, they would scale.
    """
    head_dim = entries.shape[-1]
    return (entries * (head_dim & -head_dim) ** -0.5) @ signs
