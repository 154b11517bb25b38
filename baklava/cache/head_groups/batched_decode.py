"""What heads of several sequences hold, as rows of one batch that stays as long as these decode together."""

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from weakref import ref

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava.cache.attention import Attention, Grouped, Kernel, Summary, normalised
from baklava.cache.head_groups.base import HeadGroup, Tokens
from baklava.cache.head_groups.centroids import Centroids
from baklava.cache.head_groups.scored import Ranked
from baklava.cache.storage import NOTHING, Slots, Spliced
from baklava.eviction import Observation


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


ALIKE = 0.7
"""Of heads that attend together, those with fewest entries have at least this share of those with most."""


def joinable(group: HeadGroup) -> bool:
    """Whether such heads take a token in together: those that are scored by the probabilities of every query."""
    if not isinstance(group, Ranked) or not group.filled:
        return False
    sample = group.eviction.sample
    return sample.window != 0 and not sample.whole


def alike(groups: Sequence[Ranked], rows: Iterable[int]) -> list[list[int]]:
    """Which of these rows have about as many entries, so that little is computed for nothing."""
    order = sorted(rows, key=lambda row: -groups[row].filled)
    together: list[list[int]] = []
    for row in order:
        if not together or groups[row].filled < ALIKE * groups[together[-1][0]].filled:
            together.append([])
        together[-1].append(row)
    return [sorted(rows) for rows in together]


def step_together(heads: Sequence[HeadGroup], tokens: Tokens, kernel: Kernel) -> tuple[Grouped, dict[int, Exception]]:
    """What `attend` does with one new token of each sequence, a row each; and what failed in which rows."""
    groups = [group for group in heads if isinstance(group, Ranked)]
    first = groups[0]
    key = tokens.key if first.key_rotation is None else first.key_rotation.turned(tokens.key)
    query = tokens.query if first.key_rotation is None else first.key_rotation.turned(tokens.query)
    value = tokens.value if first.value_rotation is None else first.value_rotation.turned(tokens.value)
    turned = Tokens(0, query, key, value, tokens.positions, False, False)
    failed: dict[int, Exception] = {}
    _attempt(Ranked.make_room, groups, failed)
    output = torch.zeros_like(query)
    stacks, loose = _apart(groups, failed)
    batches = [(rows, _stacked) for rows in stacks] + [(rows, _copied) for rows in alike(groups, loose)]
    for rows, batch in batches:
        own = _rows_of(turned, rows)
        output[rows] = _attended(batch([groups[row] for row in rows], own), own, kernel)
    _attempt(Ranked.age, groups, failed)
    return output if first.value_rotation is None else first.value_rotation.turned_back(output), failed


def _attempt(act: Callable[[Ranked], None], groups: Sequence[Ranked], failed: dict[int, Exception]) -> None:
    """Do something with the heads of each row that has not failed; what fails there is noted."""
    for row, group in enumerate(groups):
        if row in failed:
            continue
        try:
            act(group)
        except Exception as error:
            failed[row] = error


def _apart(groups: Sequence[Ranked], failed: Container[int]) -> tuple[list[list[int]], list[int]]:
    """Rows that can be stacked with each other, and those that cannot: they grow, or have slots like no other."""
    by_slots: dict[int, list[int]] = {}
    loose: list[int] = []
    for row, group in enumerate(groups):
        if row not in failed:
            (by_slots.setdefault(group.size, []) if stackable(group) else loose).append(row)
    loose += [rows[0] for rows in by_slots.values() if len(rows) == 1]
    return [rows for rows in by_slots.values() if len(rows) > 1], loose


def _rows_of(tokens: Tokens, rows: Sequence[int]) -> Tokens:
    if len(rows) == len(tokens.key):  # they come in order
        return tokens
    index = list(rows)
    query, key, value = (each[index] for each in (tokens.query, tokens.key, tokens.value))
    return Tokens(0, query, key, value, tokens.positions[index], False, False)


@dataclass(frozen=True)
class _Batch:
    """What these heads hold, as rows of one batch, of which the first entries count.

    Where rows have fewer of them, `hidden` tells which are none. `summary` stands for what was evicted.
    """

    groups: Sequence[Ranked]
    keys: Slots | Spliced
    values: Slots | Spliced
    positions: Int[Tensor, "batch heads entries"]
    scores: Float[Tensor, "batch heads entries"]
    hidden: Tensor | None
    summary: Summary | None

    @classmethod
    def of(
        cls,
        groups: Sequence[Ranked],
        keys: Slots | Spliced,
        values: Slots | Spliced,
        positions: Tensor,
        scores: Tensor,
        centroids: Centroids | None,
    ) -> "_Batch":
        """What is held, up to the last entry of the row that has most."""
        positions, hidden = _hidden(positions, [group.filled for group in groups])
        summary = None if centroids is None else centroids.summary(torch.float32)
        return cls(groups, keys, values, positions, scores, hidden, summary)


def _stacked(groups: Sequence[Ranked], tokens: Tokens) -> _Batch:
    """A view of the stack that these heads are in, with the new tokens."""
    stack, filled = Stack.of(groups), [group.filled for group in groups]
    stack.write([each - 1 for each in filled], tokens.key, tokens.value, tokens.positions)
    most = max(filled)
    state = stack.positions[..., :most], stack.scores[..., :most], stack.centroids
    return _Batch.of(groups, stack.keys, stack.values, *state)


def _copied(groups: Sequence[Ranked], tokens: Tokens) -> _Batch:
    """Copies of what these heads hold, with the new tokens; those may grow, or differ in their slots."""
    for group in groups:
        group.stand_alone()
    filled = [group.filled for group in groups]
    starts, most = [each - 1 for each in filled], max(filled)
    keys, values = [group.keys for group in groups], [group.values for group in groups]
    for storages, entries in ((keys, tokens.key), (values, tokens.value)):
        storages[0].write_each(storages[1:], starts, entries)  # type: ignore[attr-defined]
    for row, group in enumerate(groups):
        group.positions[..., starts[row]], group.scores[..., starts[row]] = tokens.positions[row], 0.0
    positions, scores = (_padded([getattr(g, name) for g in groups], most) for name in ("positions", "scores"))
    centroids = Centroids.joined([each.centroids for each in groups if each.centroids is not None])
    return _Batch.of(groups, joined(keys, most), joined(values, most), positions, scores, centroids)  # type: ignore[arg-type]


def _hidden(positions: Tensor, filled: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Positions that say NOTHING behind what a row has, and where that is."""
    if min(filled) == positions.shape[2]:
        return positions, None
    last = torch.tensor(filled, device=positions.device)[:, None, None]
    hidden = torch.arange(positions.shape[2], device=positions.device) >= last
    return positions.masked_fill(hidden, NOTHING), hidden


def _padded(states: Sequence[Tensor], most: int) -> Tensor:
    if len(states) == 1:
        return states[0][..., :most]
    if min(state.shape[2] for state in states) >= most:
        return torch.cat([state[..., :most] for state in states])
    return torch.cat(
        [torch.nn.functional.pad(state[..., :most], (0, max(0, most - state.shape[2]))) for state in states]
    )


def _attended(batch: _Batch, tokens: Tokens, kernel: Kernel) -> Grouped:
    query = tokens.query[:, :, :, 0]
    logits = batch.keys.dots(query.float() * kernel.scaling, batch.positions.shape[2])
    first = 0
    if batch.summary is not None:
        first = batch.summary.key.shape[2]
        bias = batch.summary.bias[:, :, None]
        standing_in = torch.matmul(query.float() * kernel.scaling, batch.summary.key.transpose(2, 3))
        logits = torch.cat([kernel.capped(standing_in) + bias, kernel.capped(logits)], -1)
    else:
        logits = kernel.capped(logits)
    visible = None if batch.hidden is None else ~batch.hidden[:, :, None]
    attention = normalised(logits[:, :, :, None], visible, kernel)
    own = attention[..., first:]
    output = batch.values.mixed(own[:, :, :, 0])
    if batch.summary is not None:
        output += torch.matmul(attention[:, :, :, 0, :first], batch.summary.value)
    _score(batch, tokens, own, kernel)
    return output[:, :, :, None].to(query.dtype)


def _score(batch: _Batch, tokens: Tokens, attention: Attention, kernel: Kernel) -> None:
    # Who observes probabilities in decoding asks for nothing else of the entries; they are never read out.
    nothing = attention.new_zeros(()).expand(*batch.scores.shape, tokens.key.shape[3])
    seen = Observation(
        query=tokens.query,
        key=nothing,
        value=nothing,
        query_positions=tokens.positions,
        key_positions=batch.positions,
        previous=batch.scores,
        scaling=kernel.scaling,
        attend=lambda: attention,
        decoding=True,
    )
    scores = batch.groups[0].eviction.score(seen)
    if isinstance(batch.groups[0].shared, Stack):
        batch.scores.copy_(scores)
        return
    for row, group in enumerate(batch.groups):
        group.scores[..., : group.filled] = scores[row : row + 1, :, : group.filled]
