"""Codes of 1 to 8 bits in whole bytes."""

import torch
from jaxtyping import UInt8
from torch import Tensor

WIDTHS = {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}
"""Bits of each plane that a code is cut into, lowest first: those that divide a byte."""


def pack(codes: UInt8[Tensor, "*slots head_dim"], bits: int) -> UInt8[Tensor, "*slots bytes"]:
    """Codes side by side in bytes: plane after plane, and in a plane of n bytes, code i in byte i modulo n."""
    planes, shift = [], 0
    for width in WIDTHS[bits]:
        parts = ((codes >> shift) & _mask(width)).chunk(8 // width, -1)
        plane = parts[0]
        for place, part in enumerate(parts[1:], 1):
            plane = plane | (part << place * width)
        planes.append(plane)
        shift += width
    return torch.cat(planes, -1)


def unpack(packed: UInt8[Tensor, "*slots bytes"], bits: int, head_dim: int) -> UInt8[Tensor, "*slots head_dim"]:
    """The inverse of `pack`."""
    codes, start, shift = None, 0, 0
    for width in WIDTHS[bits]:
        size = head_dim * width // 8
        plane = _spread(packed[..., start : start + size], width)
        codes = plane if codes is None else codes | (plane << shift)
        start, shift = start + size, shift + width
    assert codes is not None
    return codes


def _spread(plane: Tensor, width: int) -> Tensor:
    if width == 8:
        return plane
    last = 8 // width - 1
    between = [(plane >> place * width) & _mask(width) for place in range(1, last)]
    return torch.cat([plane & _mask(width), *between, plane >> last * width], -1)


def _mask(width: int) -> int:
    return (1 << width) - 1
