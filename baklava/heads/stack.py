"""What heads of several sequences hold, as rows of one batch that stays as long as these decode together."""

from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor

from baklava.heads.centroids import Centroids
from baklava.heads.ranked import Ranked
from baklava.storage import Slots, Spliced


def stackable(group: Ranked) -> bool:
    """Whether it holds all the slots that it ever will, so that its tensors stay where they are."""
    return group.size == group.slots


class Stack:
    """Heads that hold equally many slots, a row each: what each of them holds is a view of the stack's tensors.

    So nothing is held twice, and what is done to all rows is one operation. A row that leaves takes copies along (see
    `HeadGroup.stand_alone`); its place goes when all have left.
    """

    def __init__(self, groups: Sequence[Ranked]) -> None:
        self._members = tuple(map(ref, groups))
        size = groups[0].size
        self.keys, self.values = (
            joined([getattr(group, name) for group in groups], size) for name in ("keys", "values")
        )
        self.positions = torch.cat([group.positions for group in groups])
        self.scores = torch.cat([group.scores for group in groups])
        self.centroids = Centroids.joined([each.centroids for each in groups if each.centroids is not None])
        for row, group in enumerate(groups):
            group.keys, group.values = self.keys.row(row), self.values.row(row)
            group.positions, group.scores = self.positions[row : row + 1], self.scores[row : row + 1]
            group.centroids = None if self.centroids is None else self.centroids.row(row)
            group.shared = self

    @classmethod
    def of(cls, groups: Sequence[Ranked]) -> "Stack":
        """The stack of exactly these heads, in this order: the one that they are in, or a new one."""
        shared = groups[0].shared
        if isinstance(shared, cls) and shared._is_of(groups):
            return shared
        return cls(groups)

    def _is_of(self, groups: Sequence[Ranked]) -> bool:
        return len(groups) == len(self._members) and all(
            member() is group and group.shared is self for member, group in zip(self._members, groups, strict=True)
        )

    @property
    def sharers(self) -> int:
        """Rows that still need it."""
        return sum((group := member()) is not None and group.shared is self for member in self._members)

    def write(self, starts: Sequence[int], key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Put an entry into each row, at a slot of its own; nothing is known of it yet."""
        index = torch.tensor(starts, device=positions.device)[:, None, None]
        self.keys.write_rows(starts, key)
        self.values.write_rows(starts, value)
        index = index.expand(*self.positions.shape[:2], 1)
        self.positions.scatter_(2, index, positions[:, None].expand(index.shape).int())
        self.scores.scatter_(2, index, 0.0)


def joined(storages: Sequence[Slots | Spliced], slots: int) -> Slots | Spliced:
    """Copies of the first slots of storages of one kind, as rows of one batch."""
    first, *others = storages
    return first.joined(others, slots)  # type: ignore[arg-type]
