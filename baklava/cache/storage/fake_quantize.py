"""What keys and values are after packing, without a cache around them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava.cache.storage import Layout, storage_for
from baklava.cache.storage.hadamard import Rotation
from baklava.cache.storage.quantized_codec import WIDTHS
from baklava.plan.byte_accounting import FULL_BITS, grades

Entries = Float[Tensor, "heads entries head_dim"]


def packable(head_dim: int, bits: int) -> bool:
    """Whether heads of this dimension fill whole bytes in so many bits."""
    return bits >= FULL_BITS or all(head_dim * width % 8 == 0 for width in WIDTHS[bits])


def read_back(
    entries: Entries, bits: int, sinks: int, *, centred: bool, order: Int[Tensor, "heads head_dim"] | None = None
) -> Entries:
    """Keys (`centred`) or values as a packed head returns them; the sinks stay in 16 bits.

    `order` has the channels of each head, the most important first, where their bits follow that.
    """
    if bits >= FULL_BITS:
        return entries
    tokens, head_dim = entries.shape[1:]
    coded = grades(head_dim, bits, order is not None)
    rotation = Rotation.of(tuple(channels for channels, _ in coded), entries, order if len(coded) > 1 else None)
    held = rotation.turned(entries[None])
    storage = storage_for(coded, held, Layout(tokens, sinks), centred=centred)
    storage.select(torch.arange(tokens, device=entries.device)[None, None], 0, held, tokens)
    return rotation.turned_back(storage.read(tokens))[0]
