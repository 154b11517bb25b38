"""Padding on the left of a batch's rows: read from the attention mask, and refused where it is anywhere else."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from baklava.errors import UserError


class Padding:
    """Counts padding for all layers of a cache; only a forward's first layer looks, as looking waits for a GPU."""

    def __init__(self) -> None:
        self._looked_at: tuple[int, int] | None = None
        self._pads: Int[Tensor, " batch"] | None = None

    def count(self, mask: Tensor, known: Int[Tensor, " batch"] | None, seen: int, total: int) -> Int[Tensor, " batch"]:
        """Padding tokens per row, of a cache that knew of `known` after `seen` tokens and will have seen `total`.

        Padding may grow in a row that has had nothing else yet, as it does where a prompt comes in chunks.

        Raises:
            UserError: the mask hides anything but tokens on the left of a row.
        """
        key = (total, mask.data_ptr())
        if self._pads is None or self._looked_at != key:
            self._pads, self._looked_at = _grown(_left_pads(_real(mask, total)), known, seen), key
        return self._pads

    def forget(self) -> None:
        """Look again at the next forward, whatever it brings."""
        self._looked_at = None


def _grown(pads: Int[Tensor, " batch"], known: Int[Tensor, " batch"] | None, seen: int) -> Int[Tensor, " batch"]:
    known = torch.zeros_like(pads) if known is None else known
    if not bool(((pads == known) | (known >= seen)).all()):
        raise UserError(
            f"the attention mask hides tokens that came after the first {seen}; pad on the left of the first prompt "
            "only"
        )
    return pads


def _real(padding: Tensor, seen: int) -> Bool[Tensor, "batch tokens"]:
    """Which tokens are real, from the 4D view that our mask function makes of a 2D mask."""
    # A stride of 0 is our own view; another mask is compared row by row.
    one_row = padding.shape[2] == 1 or padding.stride(2) == 0 or bool((padding == padding[:, :, -1:]).all())
    if padding.dtype != torch.bool or not one_row:
        raise UserError(
            "the 4D attention mask hides other tokens from each query, which a budgeted cache cannot keep; pass a 2D "
            "mask with one row per sequence"
        )
    if padding.shape[-1] != seen:
        raise UserError(
            f"the attention mask covers {padding.shape[-1]} tokens, but with this forward the cache has seen {seen}; "
            "pass a mask over all turns"
        )
    return padding[:, 0, -1]


def _left_pads(real: Bool[Tensor, "batch tokens"]) -> Int[Tensor, " batch"]:
    if bool((real[:, 1:] < real[:, :-1]).any()):
        raise UserError(
            "the attention mask hides tokens behind real ones; a budgeted cache takes padding on the left only: set "
            'tokenizer.padding_side = "left"'
        )
    return (~real).sum(-1)
