"""Codes of 1 to 8 bits in whole bytes."""

import math

import torch
from jaxtyping import UInt8
from torch import Tensor

WIDTHS = {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}
"""Bits of each plane that a code is cut into, lowest first: those that divide a byte."""


_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


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
    if len(WIDTHS[bits]) == 1 or torch.compiler.is_compiling():
        return _in_bytes(packed, bits, head_dim)
    return _in_words(packed, bits, head_dim)


def _in_bytes(packed: Tensor, bits: int, head_dim: int) -> Tensor:
    codes, start, shift = None, 0, 0
    for width in WIDTHS[bits]:
        size = head_dim * width // 8
        plane = _spread(packed[..., start : start + size], width)
        codes = plane if codes is None else codes | (plane << shift)
        start, shift = start + size, shift + width
    assert codes is not None
    return codes


def _in_words(packed: Tensor, bits: int, head_dim: int) -> Tensor:
    """Several bytes at a time, shifted and masked as one number: twice as fast where there is more than one plane."""
    sizes = [head_dim * width // 8 for width in WIDTHS[bits]]
    size = math.gcd(8, *sizes, packed.storage_offset(), *packed.stride()[:-1])
    words = packed.view(_WORDS[size])
    codes = words.new_empty(*packed.shape[:-1], head_dim // size)
    start, shift = 0, 0
    for width, plane_bytes in zip(WIDTHS[bits], sizes, strict=True):
        count = plane_bytes // size
        plane = words[..., start : start + count]
        for place in range(8 // width):
            here = codes[..., place * count : (place + 1) * count]
            part = _shifted(plane, shift - place * width) & _repeated(_mask(width) << shift, size)
            here.bitwise_or_(part) if shift else here.copy_(part)
        start, shift = start + count, shift + width
    return codes.view(torch.uint8)


def _shifted(words: Tensor, by: int) -> Tensor:
    """Shifted up, or down where `by` is negative; what crosses into a neighbour is for a mask to hide."""
    return words << by if by > 0 else words >> -by if by else words


def _repeated(byte: int, size: int) -> int:
    """A byte in each place of a word, as the signed number that it is then."""
    return int.from_bytes(bytes([byte]) * size, "little", signed=size > 1)


def _spread(plane: Tensor, width: int) -> Tensor:
    if width == 8:
        return plane
    last = 8 // width - 1
    between = [(plane >> place * width) & _mask(width) for place in range(1, last)]
    return torch.cat([plane & _mask(width), *between, plane >> last * width], -1)


def _mask(width: int) -> int:
    return (1 << width) - 1
