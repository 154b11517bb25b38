"""Cache layers that attend for themselves, as far as all of them are alike to transformers."""

from transformers.cache_utils import CacheLayerMixin
from typing_extensions import override


class AttendingLayer(CacheLayerMixin):
    """A layer that takes new keys in when it attends; `seen` are the tokens of a row so far.

    It satisfies `attention.BudgetedLayer` by an `attend` of its own.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def get_seq_length(self) -> int:
        """Tokens seen, not entries held: positions and masks count from it."""
        return self.seen

    @override
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    @override
    def get_max_length(self) -> int:
        return -1
