"""One decode step of several sequences at once: their entries become rows of one batch while they decode together."""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import ref

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from baklava.cache.attention import AttentionParams, AttentionProbs, CentroidEntries, GroupedQueries, masked_softmax
from baklava.cache.head_groups.base import HeadGroup, NewTokens
from baklava.cache.head_groups.centroids import Centroids
from baklava.cache.head_groups.score_updates import scores_after_decoding
from baklava.cache.head_groups.scored import ScoredHeadGroup
from baklava.cache.storage import EMPTY, SegmentedStorage, SlotStorage

MIN_LENGTH_RATIO = 0.7
"""In a batch of copies the shortest row has at least this share of the entries of the longest."""


def can_batch(group: HeadGroup) -> bool:
    """Return whether such heads can decode in a batch: their scores need only the probabilities of every query."""
    if not isinstance(group, ScoredHeadGroup) or not group.num_filled:
        return False
    sample = group.eviction.query_sample
    return sample.window != 0 and not sample.single_block


def has_all_slots(group: ScoredHeadGroup) -> bool:
    """Return whether all slots are allocated, so that the group's tensors stay where they are."""
    return group.num_slots == group.max_slots


class BatchedKV:
    """Head groups with equally many slots, one row each; the tensors of each group are views of the batch's tensors.

    Nothing is stored twice, and one operation changes all rows. A row that leaves takes copies along (see
    `HeadGroup.unshare`). Its memory is free once all rows have left.
    """

    def __init__(self, groups: Sequence[ScoredHeadGroup]) -> None:
        self._members = tuple(map(ref, groups))
        size = groups[0].num_slots
        self.keys, self.values = (
            stack([getattr(group, name) for group in groups], size) for name in ("keys", "values")
        )
        self.positions = torch.cat([group.positions for group in groups])
        self.scores = torch.cat([group.scores for group in groups])
        self.centroids = Centroids.cat([each.centroids for each in groups if each.centroids is not None])
        for row, group in enumerate(groups):
            group.keys, group.values = self.keys.row(row), self.values.row(row)
            group.positions, group.scores = self.positions[row : row + 1], self.scores[row : row + 1]
            group.centroids = None if self.centroids is None else self.centroids.row(row)
            group.shared, group.table = self, None

    @classmethod
    def of(cls, groups: Sequence[ScoredHeadGroup]) -> "BatchedKV":
        """Return the batch of exactly these groups, in this order: the one that they are in, or a new one."""
        shared = groups[0].shared
        if isinstance(shared, cls) and shared._is_of(groups):
            return shared
        return cls(groups)

    def _is_of(self, groups: Sequence[ScoredHeadGroup]) -> bool:
        return len(groups) == len(self._members) and all(
            member() is group and group.shared is self for member, group in zip(self._members, groups, strict=True)
        )

    @property
    def num_sharers(self) -> int:
        """Number of rows that still use the batch."""
        return sum((group := member()) is not None and group.shared is self for member in self._members)

    def write(self, starts: Sequence[int], key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Write one entry into each row, each at its own slot, with score 0."""
        index = torch.tensor(starts, device=positions.device)[:, None, None]
        self.keys.write_rows(starts, key)
        self.values.write_rows(starts, value)
        index = index.expand(*self.positions.shape[:2], 1)
        self.positions.scatter_(2, index, positions[:, None].expand(index.shape).int())
        self.scores.scatter_(2, index, 0.0)


def stack(storages: Sequence[SlotStorage | SegmentedStorage], slots: int) -> SlotStorage | SegmentedStorage:
    """Return copies of the first slots of storages of one kind, as rows of one batch."""
    first, *others = storages
    return first.stack(others, slots)  # type: ignore[arg-type]


def batched_step(heads: Sequence[HeadGroup], tokens: NewTokens, params: AttentionParams) -> GroupedQueries:
    """Do what `HeadGroup.attend` does with one new token of each sequence, one row each."""
    groups = [group for group in heads if isinstance(group, ScoredHeadGroup)]
    rotated = groups[0].rotate(tokens)
    for group in groups:
        group.reserve_slot(group.num_filled)
    output = torch.zeros_like(rotated.query)
    stacked, copied = _split_by_storage(groups)
    for rows in stacked:
        own = _select_rows(rotated, rows)
        output[rows] = _attend(_view_of([groups[row] for row in rows], own), own, params)
    for rows in bucket_by_length(groups, copied):
        own = _select_rows(rotated, rows)
        output[rows] = _attend(_copy_of([groups[row] for row in rows], own), own, params)
    for group in groups:
        group.maybe_evict()
    return groups[0].rotate_back(output)


def _split_by_storage(groups: Sequence[ScoredHeadGroup]) -> tuple[list[list[int]], list[int]]:
    """Return rows that are stacked in a `BatchedKV`, and rows that are copied at every step.

    A row is copied if it still grows, or if no other row has as many slots.
    """
    by_slots: dict[int, list[int]] = {}
    copied: list[int] = []
    for row, group in enumerate(groups):
        (by_slots.setdefault(group.num_slots, []) if has_all_slots(group) else copied).append(row)
    copied += [rows[0] for rows in by_slots.values() if len(rows) == 1]
    return [rows for rows in by_slots.values() if len(rows) > 1], copied


def bucket_by_length(groups: Sequence[ScoredHeadGroup], rows: Sequence[int]) -> list[list[int]]:
    """Return buckets of rows with about as many entries, so that little is computed on padding."""
    buckets: list[list[int]] = []
    for row in sorted(rows, key=lambda row: -groups[row].num_filled):
        if not buckets or groups[row].num_filled < MIN_LENGTH_RATIO * groups[buckets[-1][0]].num_filled:
            buckets.append([])
        buckets[-1].append(row)
    return [sorted(bucket) for bucket in buckets]


def _select_rows(tokens: NewTokens, rows: Sequence[int]) -> NewTokens:
    if len(rows) == len(tokens.key):  # they are in order
        return tokens
    index = list(rows)
    query, key, value = (tensor[index] for tensor in (tokens.query, tokens.key, tokens.value))
    return NewTokens(0, query, key, value, tokens.positions[index], padded=False, teacher_forced=False)


@dataclass(frozen=True)
class _Batch:
    """Entries of some groups as rows of one batch; `hidden` marks slots after the last entry of a shorter row."""

    groups: Sequence[ScoredHeadGroup]
    keys: SlotStorage | SegmentedStorage
    values: SlotStorage | SegmentedStorage
    positions: Int[Tensor, "batch heads entries"]
    scores: Float[Tensor, "batch heads entries"]
    hidden: Tensor | None
    centroids: CentroidEntries | None


def _view_of(groups: Sequence[ScoredHeadGroup], tokens: NewTokens) -> _Batch:
    """Write the new tokens into the `BatchedKV` of these groups, and return a view of it."""
    batch, lengths = BatchedKV.of(groups), [group.num_filled for group in groups]
    batch.write([length - 1 for length in lengths], tokens.key, tokens.value, tokens.positions)
    longest = max(lengths)
    positions, hidden = _hide_unfilled(batch.positions[..., :longest], lengths)
    centroids = None if batch.centroids is None else batch.centroids.entries(torch.float32)
    return _Batch(groups, batch.keys, batch.values, positions, batch.scores[..., :longest], hidden, centroids)


def _copy_of(groups: Sequence[ScoredHeadGroup], tokens: NewTokens) -> _Batch:
    """Write the new tokens into these groups, and return a copy of all: they may grow, or differ in their slots."""
    for group in groups:
        group.unshare()
    lengths = [group.num_filled for group in groups]
    slots, longest = [length - 1 for length in lengths], max(lengths)
    keys, values = [group.keys for group in groups], [group.values for group in groups]
    for storages, entries in ((keys, tokens.key), (values, tokens.value)):
        storages[0].write_each(storages[1:], slots, entries)  # type: ignore[attr-defined]
    for row, group in enumerate(groups):
        group.positions[..., slots[row]], group.scores[..., slots[row]] = tokens.positions[row], 0.0
    positions = _pad_and_cat([group.positions for group in groups], longest)
    scores = _pad_and_cat([group.scores for group in groups], longest)
    positions, hidden = _hide_unfilled(positions, lengths)
    centroids = Centroids.cat([group.centroids for group in groups if group.centroids is not None])
    return _Batch(
        groups,
        stack(keys, longest),  # type: ignore[arg-type]
        stack(values, longest),  # type: ignore[arg-type]
        positions,
        scores,
        hidden,
        None if centroids is None else centroids.entries(torch.float32),
    )


def _hide_unfilled(positions: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Return positions that are EMPTY after the last entry of a row, and a mask of these slots if there are any."""
    if min(lengths) == positions.shape[2]:
        return positions, None
    hidden = torch.arange(positions.shape[2], device=positions.device) >= torch.tensor(
        lengths, device=positions.device
    ).view(-1, 1, 1)
    return positions.masked_fill(hidden, EMPTY), hidden


def _pad_and_cat(states: Sequence[Tensor], length: int) -> Tensor:
    if len(states) == 1:
        return states[0][..., :length]
    states = [state[..., :length] for state in states]
    # Padding by nothing would copy.
    return torch.cat(
        [state if state.shape[2] == length else pad(state, (0, length - state.shape[2])) for state in states]
    )


def _attend(batch: _Batch, tokens: NewTokens, params: AttentionParams) -> GroupedQueries:
    query = tokens.query[:, :, :, 0]
    logits = params.apply_softcap(batch.keys.query_key_scores(query.float() * params.scaling, batch.positions.shape[2]))
    num_centroids = 0
    if batch.centroids is not None:
        num_centroids = batch.centroids.key.shape[2]
        centroid_logits = torch.matmul(query.float() * params.scaling, batch.centroids.key.transpose(2, 3))
        centroid_logits = params.apply_softcap(centroid_logits) + batch.centroids.bias[:, :, None]
        logits = torch.cat([centroid_logits, logits], -1)
    visible = None if batch.hidden is None else ~batch.hidden[:, :, None]
    probs = masked_softmax(logits[:, :, :, None], visible, params)
    entry_probs = probs[..., num_centroids:]
    output = batch.values.weighted_values(entry_probs[:, :, :, 0])
    if batch.centroids is not None:
        output += torch.matmul(probs[:, :, :, 0, :num_centroids], batch.centroids.value)
    _update_scores(batch, tokens, entry_probs, params)
    return output[:, :, :, None].to(query.dtype)


def _update_scores(batch: _Batch, tokens: NewTokens, probs: AttentionProbs, params: AttentionParams) -> None:
    scores = scores_after_decoding(
        batch.groups[0].eviction,
        tokens.query,
        probs,
        tokens.positions,
        batch.positions,
        batch.scores,
        params.scaling,
    )
    if isinstance(batch.groups[0].shared, BatchedKV):
        batch.scores.copy_(scores)
        return
    for row, group in enumerate(batch.groups):
        group.scores[..., : group.num_filled] = scores[row : row + 1, :, : group.num_filled]
