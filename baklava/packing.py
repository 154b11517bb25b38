"""What keys and values are after packing, without a cache around them."""

import torch
from jaxtyping import Float
from torch import Tensor

STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 0.0308}

Entries = Float[Tensor, "heads entries head_dim"]


def packable(head_dim: int, bits: int) -> bool:
    """Whether heads of this dimension fill whole bytes in so many bits."""
    return head_dim * (1 if bits == 3 else bits) % 8 == 0


def read_back(entries: Entries, bits: int, sinks: int, *, centred: bool) -> Entries:
    """Keys (`centred`) or values as a packed head returns them; the sinks stay in 16 bits."""
    if bits >= 16:
        return entries
    n = entries.shape[-1]
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), h)
    h = h / n**0.5
    x = entries @ h
    mu = x[:, sinks:].mean(1, keepdim=True) if centred else 0
    x = x - mu
    half = (2**bits - 1) / 2
    step = torch.minimum(
        x.square().mean(-1, keepdim=True).sqrt() * STEPS[bits], x.abs().amax(-1, keepdim=True) / half
    ).clamp(min=1e-9)
    c = (x / step + half).round().clamp(0, 2 * half) - half
    s = (x * c).sum(-1, keepdim=True) / c.square().sum(-1, keepdim=True)
    out = (c * s + mu) @ h
    out[:, :sinks] = entries[:, :sinks]
    return out
