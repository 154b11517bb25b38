"""Heads with equal budgets of several sequences, which take a token in together: the same work in fewer steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava.attention import Attention, Grouped, Kernel, Summary, normalised
from baklava.eviction import Observation
from baklava.heads.base import HeadGroup, Tokens
from baklava.heads.centroids import Centroids
from baklava.heads.ranked import Ranked
from baklava.storage import NOTHING, Slots, Spliced

ALIKE = 0.7
"""Of heads that attend together, those with fewest entries have at least this share of those with most."""


def joinable(group: HeadGroup) -> bool:
    """Whether such heads take a token in together: those that are scored by the probabilities of every query."""
    if not isinstance(group, Ranked) or not group.filled:
        return False
    sample = group.eviction.sample
    return sample.window != 0 and not sample.whole


def alike(groups: Sequence[Ranked]) -> list[list[int]]:
    """Which of these have about as many entries, so that little is computed for nothing."""
    order = sorted(range(len(groups)), key=lambda row: -groups[row].filled)
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
    output = torch.zeros_like(query)
    _append(groups, turned, failed)
    for rows in alike(groups):
        rows = [row for row in rows if row not in failed]
        if rows:
            output[rows] = _attended(_Joined.of([groups[row] for row in rows]), _rows_of(turned, rows), kernel)
    _age(groups, turned, kernel, failed)
    return output if first.value_rotation is None else first.value_rotation.turned_back(output), failed


def _rows_of(tokens: Tokens, rows: Sequence[int]) -> Tokens:
    if len(rows) == len(tokens.key):  # they come in order
        return tokens
    index = list(rows)
    query, key, value = (each[index] for each in (tokens.query, tokens.key, tokens.value))
    return Tokens(0, query, key, value, tokens.positions[index], False, False)


def _append(groups: Sequence[Ranked], tokens: Tokens, failed: dict[int, Exception]) -> None:
    for row, group in enumerate(groups):
        try:
            group.make_room(tokens.positions[row : row + 1])
        except Exception as error:
            failed[row] = error
    rows = [row for row in range(len(groups)) if row not in failed]
    if not rows:
        return
    starts, tokens = [groups[row].filled - 1 for row in rows], _rows_of(tokens, rows)
    for storages, entries in (
        ([groups[row].keys for row in rows], tokens.key),
        ([groups[row].values for row in rows], tokens.value),
    ):
        head, *others = storages
        assert isinstance(head, Slots | Spliced)
        head.write_each(others, starts, entries)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Joined:
    """Copies of what these heads hold, as rows of one batch; `filled` has how many entries each row has."""

    groups: Sequence[Ranked]
    keys: Slots | Spliced
    values: Slots | Spliced
    positions: Int[Tensor, "batch heads entries"]
    scores: Float[Tensor, "batch heads entries"]
    hidden: Tensor | None
    summary: Summary | None

    @classmethod
    def of(cls, groups: Sequence[Ranked]) -> "_Joined":
        filled = [group.filled for group in groups]
        most = max(filled)
        keys, values = (
            storages[0].joined(storages[1:], most)  # type: ignore[attr-defined]
            for storages in ([group.keys for group in groups], [group.values for group in groups])
        )
        positions, scores = (_stacked([getattr(g, name) for g in groups], most) for name in ("positions", "scores"))
        last = torch.tensor(filled, device=scores.device)[:, None, None]
        scores.scatter_(2, (last - 1).expand(*scores.shape[:2], 1), 0.0)  # the new token's, of which nothing is known
        hidden = None
        if min(filled) < most:
            hidden = torch.arange(most, device=scores.device) >= last
            positions = positions.masked_fill(hidden, NOTHING)
        return cls(groups, keys, values, positions, scores, hidden, _summary(groups))


def _stacked(states: Sequence[Tensor], most: int) -> Tensor:
    if len(states) == 1:
        return states[0][..., :most]
    if min(state.shape[2] for state in states) >= most:
        return torch.cat([state[..., :most] for state in states])
    return torch.cat(
        [torch.nn.functional.pad(state[..., :most], (0, max(0, most - state.shape[2]))) for state in states]
    )


def _summary(groups: Sequence[Ranked]) -> Summary | None:
    centroids = [group.centroids for group in groups if group.centroids is not None]
    if not centroids:
        return None
    columns = zip(*(each.tensors for each in centroids), strict=True)
    return Centroids(*(torch.cat(column) for column in columns)).summary(torch.float32)


def _attended(joined: _Joined, tokens: Tokens, kernel: Kernel) -> Grouped:
    query = tokens.query[:, :, :, 0]
    logits = joined.keys.dots(query.float() * kernel.scaling, joined.positions.shape[2])
    first = 0
    if joined.summary is not None:
        first = joined.summary.key.shape[2]
        bias = joined.summary.bias[:, :, None]
        standing_in = torch.matmul(query.float() * kernel.scaling, joined.summary.key.transpose(2, 3))
        logits = torch.cat([kernel.capped(standing_in) + bias, kernel.capped(logits)], -1)
    else:
        logits = kernel.capped(logits)
    visible = None if joined.hidden is None else ~joined.hidden[:, :, None]
    attention = normalised(logits[:, :, :, None], visible, kernel)
    own = attention[..., first:]
    output = joined.values.mixed(own[:, :, :, 0])
    if joined.summary is not None:
        output += torch.matmul(attention[:, :, :, 0, :first], joined.summary.value)
    _score(joined, tokens, own, kernel)
    return output[:, :, :, None].to(query.dtype)


def _score(joined: _Joined, tokens: Tokens, attention: Attention, kernel: Kernel) -> None:
    # Who observes probabilities in decoding asks for nothing else of the entries; they are never read out.
    nothing = attention.new_zeros(()).expand(*joined.scores.shape, tokens.key.shape[3])
    seen = Observation(
        query=tokens.query,
        key=nothing,
        value=nothing,
        query_positions=tokens.positions,
        key_positions=joined.positions,
        previous=joined.scores,
        scaling=kernel.scaling,
        attend=lambda: attention,
        decoding=True,
    )
    scores = joined.groups[0].eviction.score(seen)
    for row, group in enumerate(joined.groups):
        group.scores[..., : group.filled] = scores[row : row + 1, :, : group.filled]


def _age(groups: Sequence[Ranked], tokens: Tokens, kernel: Kernel, failed: dict[int, Exception]) -> None:
    for row, group in enumerate(groups):
        if row in failed:
            continue
        try:
            group.age(_rows_of(tokens, [row]), kernel)
        except Exception as error:
            failed[row] = error
