"""Entries in 1 to 8 bits per element."""

import copy
from collections.abc import Sequence
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from baklava.errors import UserError
from baklava.storage.base import Codec, Coded, Entries, Rows, matmul
from baklava.storage.bits import WIDTHS, pack, unpack
from baklava.storage.dense import stored_dtype

STEPS = {1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
"""Spacing of the best uniform levels for a normal variable of variance 1 (Max, 1960)."""

LEAST = 16
"""Entries that make a mean: that of a few is mostly their own noise, and worse than none."""

LARGEST = torch.finfo(torch.float16).max
TINY = torch.finfo(torch.float32).tiny


class Packed(Codec):
    """Uniform codes without a zero level, and one float16 scale per entry, for entries whose channels are alike.

    Channels are made alike by a rotation, which is the caller's. The scale is the one of least squares for the codes.
    With `centred` the mean of the first entries that come together is subtracted first, per row and head, and kept in
    16 bits: keys lie around one. It stays zero in a row that had fewer than `LEAST` of them then, for good. Of normal
    entries of variance 1 the mean square error is about .119, .037, .0115 and .0001 in 2, 3, 4 and 8 bits.

    Raises:
        UserError: codes of a head do not fill whole bytes.
    """

    def __init__(self, like: Entries, bits: int, centred: bool) -> None:
        batch, heads, _, self.head_dim = like.shape
        self.compute_dtype, self.bits, self.half = like.dtype, bits, (2**bits - 1) / 2
        if wrong := [width for width in WIDTHS[bits] if self.head_dim * width % 8]:
            raise UserError(
                f"heads of dimension {self.head_dim} do not fill whole bytes in {bits} bits, which takes a multiple of "
                f"{8 // wrong[-1]}; keep them in 16 bits"
            )
        self.mean: Float[Tensor, "batch heads 1 head_dim"] | None = None
        if centred:
            dtype = stored_dtype(like.dtype, 16)
            self.mean = torch.zeros(batch, heads, 1, self.head_dim, dtype=dtype, device=like.device)

    @override
    @property
    def copies(self) -> bool:
        return True

    @override
    @property
    def nbytes(self) -> int:
        return 0 if self.mean is None else self.mean.untyped_storage().nbytes()

    @override
    def encode(self, entries: Entries) -> Coded:
        entries = entries.float() if self.mean is None else entries.float() - self.mean
        step = entries.square().mean(-1, keepdim=True).sqrt() * STEPS[self.bits]
        step = torch.minimum(step, entries.abs().amax(-1, keepdim=True) / self.half).clamp(min=TINY)
        codes = (entries / step + self.half).round().clamp(0, 2 * self.half)
        levels = codes - self.half
        scale = (entries * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)
        return pack(codes.to(torch.uint8), self.bits), scale.clamp(max=LARGEST).half()

    @override
    def decode(self, coded: Coded) -> Entries:
        packed, scale = coded
        entries = unpack(packed, self.bits, self.head_dim).to(self.compute_dtype)
        entries = entries.sub_(self.half).mul_(scale.to(self.compute_dtype))
        return entries if self.mean is None else entries.add_(self.mean)

    # A scale and what lies around zero are taken out of the products: so a code is only made a number.

    @override
    def dots(self, coded: Coded, rows: Rows) -> Float[Tensor, "batch heads rows tokens"]:
        packed, scale = coded
        rows = rows.float()
        codes = unpack(packed, self.bits, self.head_dim).float()
        found = matmul(rows, codes.transpose(2, 3)).sub_(rows.sum(-1, keepdim=True) * self.half)
        found *= scale.float().transpose(2, 3)
        return found if self.mean is None else found.add_(matmul(rows, self.mean.float().transpose(2, 3)))

    @override
    def mixed(self, coded: Coded, weights: Float[Tensor, "batch heads rows tokens"]) -> Rows:
        packed, scale = coded
        scaled = weights.float() * scale.float().transpose(2, 3)
        codes = unpack(packed, self.bits, self.head_dim).float()
        found = matmul(scaled, codes).sub_(scaled.sum(-1, keepdim=True) * self.half)
        return found if self.mean is None else found.add_(weights.float().sum(-1, keepdim=True) * self.mean.float())

    @override
    def joined(self, others: Sequence[Self]) -> Self:
        joined = copy.copy(self)
        if self.mean is not None:
            joined.mean = torch.cat([self.mean, *(other.mean for other in others if other.mean is not None)])
        return joined

    @override
    def row(self, row: int) -> Self:
        own = copy.copy(self)
        own.mean = None if self.mean is None else self.mean[row : row + 1]
        return own

    @override
    def fit(self, entries: Entries, real: Bool[Tensor, "#batch #heads tokens"]) -> None:
        if self.mean is None:
            return
        weights = real[..., None].float()
        count, total = weights.sum(2, keepdim=True), (entries.float() * weights).sum(2, keepdim=True)
        self.mean.copy_(torch.where(count >= LEAST, total / count.clamp(min=1), 0))

    @override
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        if self.mean is not None:
            self.mean = self.mean.index_select(0, rows.to(self.mean.device))
