"""The rotation that makes the channels of a head alike, so that few bits serve all of them."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HadamardRotation:
    """Walsh-Hadamard rotations of parts of the channels, side by side, behind an order of its own for every head.

    Norms, and products of two entries that are rotated alike, stay as they are. Copies of a cache share it.
    """

    hadamard: Float[Tensor, "head_dim head_dim"]
    scale: Float[Tensor, " head_dim"]
    order: Int[Tensor, "heads head_dim"] | None = None

    @classmethod
    def of(
        cls, parts: tuple[int, ...], template: Tensor, order: Int[Tensor, "heads head_dim"] | None = None
    ) -> "HadamardRotation":
        """The rotation of parts of so many channels, for entries like these."""
        hadamard, scale = _block_hadamard(parts, template.dtype, template.device)
        return cls(hadamard, scale, order)

    def rotate(self, entries: Tensor) -> Tensor:
        """Entries [batch, heads, ..., head_dim] in rotated channels."""
        if self.order is not None:
            entries = entries.gather(-1, self._wide(self.order, entries))
        return self._rotate(entries)

    def inverse_rotate(self, entries: Tensor) -> Tensor:
        """The inverse of `turned`."""
        entries = self._rotate(entries)
        return entries if self.order is None else entries.gather(-1, self._wide(self.order.argsort(-1), entries))

    def _rotate(self, entries: Tensor) -> Tensor:
        # Signs are exact in any dtype, which the entries of an orthogonal matrix are not: rounded, they would scale.
        return (entries * self.scale) @ self.hadamard

    @staticmethod
    def _wide(order: Tensor, entries: Tensor) -> Tensor:
        between = (1,) * (entries.dim() - 3)
        return order.view(1, len(order), *between, -1).expand(entries.shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> "HadamardRotation":
        return self


@functools.cache
@torch.inference_mode(mode=False)
def _block_hadamard(
    parts: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "head_dim head_dim"], Float[Tensor, " head_dim"]]:
    """Signs (1, -1, 0) of rotations that are their own inverse, and their scale, once for all who ask for them.

    Where the size of a part is no power of two, the largest that divides it is the size of the blocks that are rotated.
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
