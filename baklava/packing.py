"""What keys and values are after packing, without a cache around them."""

import torch
from jaxtyping import Float
from torch import Tensor

from baklava.heads.rotation import hadamard, rotated
from baklava.plan import FULL_BITS
from baklava.storage import Layout, storage_for
from baklava.storage.bits import WIDTHS

Entries = Float[Tensor, "heads entries head_dim"]


def packable(head_dim: int, bits: int) -> bool:
    """Whether heads of this dimension fill whole bytes in so many bits."""
    return bits >= FULL_BITS or all(head_dim * width % 8 == 0 for width in WIDTHS[bits])


def read_back(entries: Entries, bits: int, sinks: int, *, centred: bool) -> Entries:
    """Keys (`centred`) or values as a packed head returns them; the sinks stay in 16 bits."""
    if bits >= FULL_BITS:
        return entries
    tokens, head_dim = entries.shape[1:]
    signs = hadamard(head_dim, entries.dtype, entries.device)
    held = rotated(entries, signs)[None]
    storage = storage_for(bits, held, Layout(tokens, sinks), centred=centred)
    storage.select(torch.arange(tokens, device=entries.device)[None, None], 0, held, tokens)
    return rotated(storage.read(tokens), signs)[0]
