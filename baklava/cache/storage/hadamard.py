"""The rotation that makes the channels of a head alike, so that few bits are enough for all of them."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HadamardRotation:
    """Walsh-Hadamard rotations of blocks of channels, after the channels of each head have been put in order.

    It preserves norms and the products of two entries that are both rotated. Copies of a cache share it.
    """

    hadamard: Float[Tensor, "head_dim head_dim"]
    scale: Float[Tensor, " head_dim"]
    order: Int[Tensor, "heads head_dim"] | None = None

    @classmethod
    def of(
        cls, parts: tuple[int, ...], template: Tensor, order: Int[Tensor, "heads head_dim"] | None = None
    ) -> "HadamardRotation":
        """Return the rotation of parts with these numbers of channels, for entries like the template."""
        hadamard, scale = _block_hadamard(parts, template.dtype, template.device)
        return cls(hadamard, scale, order)

    def rotate(self, entries: Tensor) -> Tensor:
        """Return entries [batch, heads, ..., head_dim] in rotated channels."""
        if self.order is not None:
            entries = entries.gather(-1, self._expand(self.order, entries))
        return self._rotate(entries)

    def inverse_rotate(self, entries: Tensor) -> Tensor:
        """Return the inverse of `rotate`."""
        entries = self._rotate(entries)
        return entries if self.order is None else entries.gather(-1, self._expand(self.order.argsort(-1), entries))

    def _rotate(self, entries: Tensor) -> Tensor:
        # Signs are exact in any dtype; rounded numbers of an orthogonal matrix would change the scale.
        scaled = entries * self.scale
        return scaled @ self.hadamard.to(scaled.dtype)  # references have 32 bits beside entries of 16

    @staticmethod
    def _expand(order: Tensor, entries: Tensor) -> Tensor:
        between = (1,) * (entries.dim() - 3)
        return order.view(1, len(order), *between, -1).expand(entries.shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> "HadamardRotation":
        return self


@functools.cache
@torch.inference_mode(mode=False)
def _block_hadamard(
    parts: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "head_dim head_dim"], Float[Tensor, " head_dim"]]:
    """Return the signs (1, -1, 0) of rotations that are their own inverse, and their scale.

    If the size of a part is not a power of two, its blocks have the largest power of two that divides it.
    """
    blocks = [size & -size for size in parts for _ in range(size // (size & -size))]
    scale = torch.cat([torch.full((block,), block**-0.5) for block in blocks])
    hadamard = torch.block_diag(*map(_hadamard, blocks))
    return hadamard.to(dtype=dtype, device=device), scale.to(dtype=dtype, device=device)


def _hadamard(size: int) -> Float[Tensor, "size size"]:
    hadamard = torch.ones(1, 1)
    while len(hadamard) < size:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    return hadamard
