"""Showing attention to eviction methods, block by block, so that no prompt's whole attention is ever held."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava.cache.attention import (
    QUERY_BLOCK_SIZE,
    AttentionParams,
    AttentionProbs,
    CentroidEntries,
    GroupedQueries,
    KVStates,
    Positions,
    attend,
    attend_values,
    attention_probs,
    visibility_mask,
)
from baklava.eviction import Eviction, Observation, Sample


@dataclass(frozen=True)
class ScoreAccumulator:
    """An eviction method and the scores that it brings up to date, in place."""

    eviction: Eviction
    scores: Float[Tensor, "batch heads entries"]

    def update(self, observation: Observation) -> None:
        """Take in a block; what it computes is shared with other methods that take the same one."""
        scores = self.scores[..., : observation.key.shape[2]]
        scores.copy_(self.eviction.score(replace(observation, previous=scores)))


@dataclass(frozen=True)
class AttentionInputs:
    """What attends to what in one forward of a group of KV heads; the last entries are the queries' own.

    A `summary` stands for entries that are no longer held; who observes does not see it, but that it takes its share.
    """

    query: GroupedQueries
    key: KVStates
    value: KVStates
    query_positions: Int[Tensor, "#batch queries"]
    key_positions: Positions
    params: AttentionParams
    padded: bool = False
    decoding: bool = False
    centroids: CentroidEntries | None = None

    def attend(self, masked: bool) -> GroupedQueries:
        """Output of all queries; `masked` False promises that nothing beyond causality is hidden."""
        positions = self.query_positions, self.key_positions
        return attend(
            self.query, self.key, self.value, *positions, self.params, masked=masked, centroids=self.centroids
        )

    def attend_with_probs(self, masked: bool) -> tuple[GroupedQueries, AttentionProbs]:
        """Output and probabilities of a few queries."""
        visible = visibility_mask(self.query_positions, self.key_positions) if masked else None
        attention = attention_probs(self.query, self.key, visible, self.params, self.centroids)
        return attend_values(attention, self.value, self.centroids), self._of_entries(attention)

    def observation(self, rows: slice, reach: int, attention: AttentionProbs | None = None) -> Observation:
        """These queries over the first `reach` entries; their attention, if not given, is computed when asked for."""
        query, queries = self.query[:, :, :, rows], self.query_positions[:, rows]
        key, entries = self.key[:, :, :reach], self.key_positions[..., :reach]
        # Without padding all that came before the first of these queries is seen by every one of them.
        sure = 0 if self.padded else self.key.shape[2] - self.query.shape[3] + rows.start

        def attend() -> AttentionProbs:
            made = attention
            if made is None:
                made = attention_probs(
                    query, key, visibility_mask(queries, entries[..., sure:]), self.params, self.centroids
                )
                made = self._of_entries(made)
            return torch.where(queries[:, None, None, :, None] >= 0, made, 0) if self.padded else made

        return Observation(
            query=query,
            key=key,
            value=self.value[:, :, :reach],
            query_positions=queries,
            key_positions=entries,
            previous=key.new_zeros(()).expand(key.shape[:3]),
            scaling=self.params.scaling,
            attend=attend,
            stride=rows.step or 1,
            decoding=self.decoding,
        )

    def _of_entries(self, attention: Tensor) -> AttentionProbs:
        return attention if self.centroids is None else attention[..., self.centroids.key.shape[2] :]


def update_scores(
    forward: AttentionInputs,
    sample: Sample,
    keepers: Sequence[ScoreAccumulator],
    first: int = 0,
    prompt: int | None = None,
) -> None:
    """Show a forward's queries, as far as they are in the sample, to methods that ask for the same sample.

    They are those from `first` on of a prompt of so many tokens; by default, all of it.
    """
    queries, entries = forward.query.shape[3], forward.key.shape[2]
    for rows in _blocks(first, first + queries, prompt or queries, sample):
        observation = forward.observation(rows, entries - queries + rows.stop)
        for keeper in keepers:
            keeper.update(observation)


def first_sampled_query(prompt: int, sample: Sample) -> int:
    """The first query of a prompt of so many tokens that is in the sample; the last one always is."""
    window = prompt if sample.window is None else min(max(1, sample.window), prompt)
    return prompt - window + (window - 1) % sample.stride


def _blocks(start: int, stop: int, prompt: int, sample: Sample) -> Iterator[slice]:
    """The sampled queries from `start` to `stop` of a prompt, in blocks, counted from `start`."""
    first = first_sampled_query(prompt, sample)
    first = max(first, start + (first - start) % sample.stride)
    step = sample.stride * (stop - start if sample.whole else QUERY_BLOCK_SIZE)
    for begin in range(first - start, stop - start, step):
        last = min(begin + step - sample.stride, stop - start - 1)
        yield slice(begin, last + 1, sample.stride)
