"""The table of a layer of one cache, with what its groups are."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int
from torch import Tensor

from baklava.cache import table_columns as columns
from baklava.cache.head_groups.base import HeadGroup
from baklava.cache.head_groups.scored import ScoredHeadGroup
from baklava.cache.head_groups.table import new_rows, row_addresses


class LayerTable:
    """All that kernels know of a layer of one cache: a row for each (sequence, KV head).

    Args:
        groups: The groups of all KV heads, which take their tensors and their rows.
        batch: Sequences.
        tensors: What the groups have specified, in their order.
    """

    def __init__(self, groups: Sequence[HeadGroup], batch: int, tensors: Iterator[Tensor]) -> None:
        heads = sum(len(group.budget.heads) for group in groups)
        self.groups, self.rows = groups, new_rows(batch, heads)
        for group in groups:
            group.bind(tensors, self.rows)
        self.scored_groups = [group for group in groups if isinstance(group, ScoredHeadGroup)]
        self.pytorch_groups = [group for group in self.scored_groups if group.needs_pytorch]
        self.slots = self.rows[..., columns.SLOTS].ravel()
        """Slots of each row."""
        self.addresses: Int[np.ndarray, " rows"] = row_addresses(self.rows).ravel()
        """Address of each row."""

    @property
    def scoring(self) -> tuple[int, ...]:
        """What becomes of the probabilities, which is the same in all rows."""
        scoring: tuple[int, ...] = tuple(self.rows[0, 0, columns.UPDATE : columns.EVICTS].tolist())
        return scoring

    def check(self) -> None:
        """Raise RuntimeError if entries have moved and the table was not made again."""
        for group in self.groups:
            own, described = self.rows[:, list(group.budget.heads)], group.describe()
            if not np.array_equal(own[..., columns.NUM_COUNTERS :], described[..., columns.NUM_COUNTERS :]):
                raise RuntimeError(f"entries of {group.budget} have moved, but their table was not made again")
