"""Move queries to other positions: rotations by RoPE add up, so a rotated query needs only the rest of its rotation."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RotaryShift:
    """The RoPE of a layer, by which states are moved from one position to another.

    Attributes:
        frequencies: Angle per position of each pair of channels, in 64 bits; empty if the layer rotates nothing. The
            first channels are rotated, as many as there are in the pairs.
        interleaved: Whether pairs are adjacent channels; else a pair is channels of the first and of the second half.
    """

    frequencies: Float[Tensor, " pairs"]
    interleaved: bool = False

    def rotated_pairs(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first and the second channel of each pair, and the channels that are not rotated."""
        pairs = len(self.frequencies)
        rotated, rest = states[..., : 2 * pairs], states[..., 2 * pairs :]
        if self.interleaved:
            return rotated[..., ::2], rotated[..., 1::2], rest
        return rotated[..., :pairs], rotated[..., pairs:], rest

    def invariants(self, states: Tensor) -> Tensor:
        """Return what no position changes, in float32: the length of each pair, and all channels that do not rotate."""
        first, second, rest = self.rotated_pairs(states.float())
        return torch.cat([torch.hypot(first, second), rest], -1)

    def shift(self, states: Tensor, distances: Int[Tensor, "#batch tokens"]) -> Tensor:
        """Return states [batch, ..., tokens, head_dim] moved by these distances, in float32."""
        states, pairs = states.float(), len(self.frequencies)
        if not pairs:
            return states
        # The product with a position of 100,000 needs more than 32 bits, which not every device has.
        angles = distances.cpu().double()[..., None] * self.frequencies
        angles = angles.view(len(distances), *(1,) * (states.dim() - 3), *angles.shape[1:])
        cos, sin = (each.float().to(states.device) for each in (angles.cos(), angles.sin()))
        first, second, rest = self.rotated_pairs(states)
        turned = first * cos - second * sin, second * cos + first * sin
        if self.interleaved:
            return torch.cat([torch.stack(turned, -1).flatten(-2), rest], -1)
        return torch.cat([*turned, rest], -1)
