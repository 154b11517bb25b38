"""Keys and values as they are after quantization, without a cache."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava.cache.storage import Slab, StorageLayout, storage_for
from baklava.cache.storage.hadamard import HadamardRotation
from baklava.cache.storage.quantized_codec import PLANE_WIDTHS
from baklava.plan.geometry import FULL_BITS, bit_split

Entries = Float[Tensor, "heads entries head_dim"]


def is_packable(head_dim: int, bits: int) -> bool:
    """Return whether heads of this dimension fill whole bytes in these bits."""
    return bits >= FULL_BITS or all(head_dim * width % 8 == 0 for width in PLANE_WIDTHS[bits])


def fake_quantize(
    entries: Entries, bits: int, sinks: int, *, centred: bool, order: Int[Tensor, "heads head_dim"] | None = None
) -> Entries:
    """Return keys (`centred`) or values as they are read from a quantized head, whose sinks stay in 16 bits.

    `order` has the channels of each head, the most important first, if their bits differ.
    """
    if bits >= FULL_BITS:
        return entries
    tokens, head_dim = entries.shape[1:]
    split = bit_split(head_dim, bits, order is not None)
    rotation = HadamardRotation.of(tuple(channels for channels, _ in split), entries, order if len(split) > 1 else None)
    rotated = rotation.rotate(entries[None])
    storage = storage_for(split, rotated, StorageLayout(tokens, sinks), centred=centred)
    storage.bind(iter(Slab(storage.specs(tokens), 1, entries.device).tensors))
    storage.select(torch.arange(tokens, device=entries.device)[None, None], 0, rotated)
    return rotation.inverse_rotate(storage.read(tokens))[0]
