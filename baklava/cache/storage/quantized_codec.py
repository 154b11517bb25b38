"""Codes of 1 to 8 bits in whole bytes, with the same bits for all channels of an entry or with mixed precision."""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from typing_extensions import override

from baklava.cache.storage.base import Codec, Encoded, Entries
from baklava.cache.storage.dense_codec import stored_dtype
from baklava.cache.storage.slab import TensorSpec
from baklava.errors import UserError

PLANE_WIDTHS = {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}
"""Bits of each plane of a code, lowest first; each divides a byte."""


_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def pack(codes: UInt8[Tensor, "*slots head_dim"], bits: int) -> UInt8[Tensor, "*slots bytes"]:
    """Return codes packed into bytes: plane after plane, and in a plane of n bytes, code i in byte i modulo n."""
    planes, shift = [], 0
    for width in PLANE_WIDTHS[bits]:
        parts = ((codes >> shift) & _mask(width)).chunk(8 // width, -1)
        plane = parts[0]
        for place, part in enumerate(parts[1:], 1):
            plane = plane | (part << place * width)
        planes.append(plane)
        shift += width
    return torch.cat(planes, -1)


def unpack(packed: UInt8[Tensor, "*slots bytes"], bits: int, head_dim: int) -> UInt8[Tensor, "*slots head_dim"]:
    """Return the inverse of `pack`."""
    if len(PLANE_WIDTHS[bits]) == 1:
        return _unpack_bytes(packed, bits, head_dim)
    return _unpack_words(packed, bits, head_dim)


def _unpack_bytes(packed: Tensor, bits: int, head_dim: int) -> Tensor:
    codes, start, shift = None, 0, 0
    for width in PLANE_WIDTHS[bits]:
        size = head_dim * width // 8
        plane = _unpack_plane(packed[..., start : start + size], width)
        codes = plane if codes is None else codes | (plane << shift)
        start, shift = start + size, shift + width
    assert codes is not None
    return codes


def _unpack_words(packed: Tensor, bits: int, head_dim: int) -> Tensor:
    """Shift and mask several bytes as one number: twice as fast if there is more than one plane."""
    sizes = [head_dim * width // 8 for width in PLANE_WIDTHS[bits]]
    size = math.gcd(8, *sizes, packed.storage_offset(), *packed.stride()[:-1])
    words = packed.view(_WORDS[size])
    codes = words.new_empty(*packed.shape[:-1], head_dim // size)
    start, shift = 0, 0
    for width, plane_bytes in zip(PLANE_WIDTHS[bits], sizes, strict=True):
        count = plane_bytes // size
        plane = words[..., start : start + count]
        for place in range(8 // width):
            here = codes[..., place * count : (place + 1) * count]
            part = _shift(plane, shift - place * width) & _repeat_byte(_mask(width) << shift, size)
            here.bitwise_or_(part) if shift else here.copy_(part)
        start, shift = start + count, shift + width
    return codes.view(torch.uint8)


def _shift(words: Tensor, by: int) -> Tensor:
    """Shift up, or down if `by` is negative; the caller masks bits that cross into another byte."""
    return words << by if by > 0 else words >> -by if by else words


def _repeat_byte(byte: int, size: int) -> int:
    """Return a word of `size` equal bytes as a signed number."""
    return int.from_bytes(bytes([byte]) * size, "little", signed=size > 1)


def _unpack_plane(plane: Tensor, width: int) -> Tensor:
    if width == 8:
        return plane
    last = 8 // width - 1
    between = [(plane >> place * width) & _mask(width) for place in range(1, last)]
    return torch.cat([plane & _mask(width), *between, plane >> last * width], -1)


def _mask(width: int) -> int:
    return (1 << width) - 1


NORMAL_STEP_SIZES = {1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
"""Spacing of the best uniform levels for a normal variable of variance 1 (Max, 1960)."""

MIN_ENTRIES_FOR_MEAN = 16
"""Entries from which a mean is computed: that of fewer is mostly noise, and worse than none."""

MAX_FLOAT16 = torch.finfo(torch.float16).max
MIN_STEP = torch.finfo(torch.float32).tiny

MAX_STRETCH = 1.5
"""Maximum of a scale over the one of least squared error; normal entries in 2 bits need 1.13."""


class QuantizedCodec(Codec):
    """Uniform codes without a zero level, and one float16 scale per entry, for entries whose channels are alike.

    The caller makes the channels alike by a rotation. The scale is |x|² / x·c with the codes c, so that the decoded
    entry has the length of x in the direction of x. The scale of least squared error, x·c / |c|², shortens entries by
    12, 4 and 1 % in 2, 3 and 4 bits. That flattens the attention, and does not average out over entries as other errors
    do. The scale is at most `MAX_STRETCH` times that one, for entries that codes do not suit.

    With `centred` the mean of the first entries is subtracted, per row and head, and stored in 16 bits: keys lie around
    one. The mean stays zero in a row that had fewer than `MIN_ENTRIES_FOR_MEAN` entries then.

    The mean square error of normal entries of variance 1 is about .130, .037, .010 and .00004 in 2, 3, 4 and 8 bits.

    Raises:
        UserError: codes of a head do not fill whole bytes.
    """

    def __init__(self, template: Entries, bits: int, centred: bool) -> None:
        self.head_dim, self.compute_dtype = template.shape[3], template.dtype
        self.bits, self.half, self.centred = bits, (2**bits - 1) / 2, centred
        if wrong := [width for width in PLANE_WIDTHS[bits] if self.head_dim * width % 8]:
            raise UserError(
                f"heads of dimension {self.head_dim} do not fill whole bytes in {bits} bits, which takes a multiple of "
                f"{8 // wrong[-1]}; keep them in 16 bits"
            )
        self.mean: Float[Tensor, "batch heads 1 head_dim"] | None = None

    @override
    @property
    def reads_copy(self) -> bool:
        return True

    @override
    @property
    def parts(self) -> list[tuple[int, torch.dtype]]:
        return [(self.head_dim * self.bits // 8, torch.uint8), (1, torch.float16)]

    @override
    def state_specs(self, heads: int) -> list[TensorSpec]:
        dtype = stored_dtype(self.compute_dtype, 16)
        return [TensorSpec((heads, 1, self.head_dim), dtype)] if self.centred else []

    @override
    def bind(self, tensors: Iterator[Tensor]) -> None:
        self.mean = next(tensors) if self.centred else None

    @override
    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return () if self.mean is None else (self.mean,)

    @override
    def encode(self, entries: Entries) -> Encoded:
        entries = entries.float() if self.mean is None else entries.float() - self.mean
        squares = entries.square().sum(-1, keepdim=True)
        step = (squares / self.head_dim).sqrt() * NORMAL_STEP_SIZES[self.bits]
        step = torch.minimum(step, entries.abs().amax(-1, keepdim=True) / self.half).clamp(min=MIN_STEP)
        codes = (entries / step + self.half).round().clamp(0, 2 * self.half)
        levels = codes - self.half
        products = (entries * levels).sum(-1, keepdim=True)
        scale = torch.minimum(
            squares / products.clamp(min=MIN_STEP), MAX_STRETCH * products / levels.square().sum(-1, keepdim=True)
        )
        return pack(codes.to(torch.uint8), self.bits), scale.clamp(max=MAX_FLOAT16).half()

    @override
    def decode(self, encoded: Encoded) -> Entries:
        packed, scale = encoded
        entries = unpack(packed, self.bits, self.head_dim).to(self.compute_dtype)
        entries = entries.sub_(self.half).mul_(scale.to(self.compute_dtype))
        return entries if self.mean is None else entries.add_(self.mean)

    @override
    def fit(self, entries: Entries, real: Bool[Tensor, "#batch #heads tokens"]) -> None:
        if self.mean is None:
            return
        weights = real[..., None].float()
        count, total = weights.sum(2, keepdim=True), (entries.float() * weights).sum(2, keepdim=True)
        self.mean.copy_(torch.where(count >= MIN_ENTRIES_FOR_MEAN, total / count.clamp(min=1), 0))


class MixedPrecisionCodec(Codec):
    """Channels in different numbers of bits: adjacent quantized codes, each of its own sorted and rotated channels."""

    def __init__(self, codecs: Sequence[QuantizedCodec]) -> None:
        self.codecs = list(codecs)
        self.compute_dtype = self.codecs[0].compute_dtype

    @override
    @property
    def reads_copy(self) -> bool:
        return True

    @override
    @property
    def parts(self) -> list[tuple[int, torch.dtype]]:
        return [part for codec in self.codecs for part in codec.parts]

    @override
    def state_specs(self, heads: int) -> list[TensorSpec]:
        return [spec for codec in self.codecs for spec in codec.state_specs(heads)]

    @override
    def bind(self, tensors: Iterator[Tensor]) -> None:
        for codec in self.codecs:
            codec.bind(tensors)

    @override
    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for codec in self.codecs for tensor in codec.tensors)

    @override
    def encode(self, entries: Entries) -> Encoded:
        return tuple(tensor for part, own in self._each(entries) for tensor in part.encode(own))

    @override
    def decode(self, encoded: Encoded) -> Entries:
        return torch.cat([part.decode(pair) for part, pair in zip(self.codecs, self._pairs(encoded), strict=True)], -1)

    @override
    def fit(self, entries: Entries, real: Bool[Tensor, "#batch #heads tokens"]) -> None:
        for part, own in self._each(entries):
            part.fit(own, real)

    @staticmethod
    def _pairs(encoded: Encoded) -> list[Encoded]:
        return list(zip(encoded[::2], encoded[1::2], strict=True))

    def _each(self, entries: Entries) -> Iterator[tuple[QuantizedCodec, Entries]]:
        channels = entries.split([part.head_dim for part in self.codecs], -1)
        yield from zip(self.codecs, channels, strict=True)
