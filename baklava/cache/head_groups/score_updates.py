"""Scores of eviction methods, updated block by block so that a prompt's whole attention is never materialised."""

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
from baklava.eviction import Eviction, Observation, QuerySample


@dataclass(frozen=True)
class ScoreAccumulator:
    """An eviction method and the scores that it updates in place."""

    eviction: Eviction
    scores: Float[Tensor, "batch heads entries"]

    def update(self, observation: Observation) -> None:
        """Update the scores by one block of queries; methods that get the same block share what it computes."""
        scores = self.scores[..., : observation.key.shape[2]]
        scores.copy_(self.eviction.score(replace(observation, previous_scores=scores)))


@dataclass(frozen=True)
class AttentionInputs:
    """Queries and entries of one forward of a group of KV heads; the last entries are the queries' own.

    `centroids` stand for evicted entries. Eviction methods do not observe them, but the attention that the centroids
    get is missing from that of the entries.
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
        """Return the output of all queries; `masked` is as in `attention.attend`."""
        positions = self.query_positions, self.key_positions
        return attend(
            self.query, self.key, self.value, *positions, self.params, masked=masked, centroids=self.centroids
        )

    def attend_and_observe(self, accumulators: Sequence["ScoreAccumulator"]) -> GroupedQueries:
        """Return the output of all queries, and update scores that observe every one of them.

        The probabilities are computed once for both, block by block.
        """
        outputs, queries = [], self.query.shape[3]
        for start in range(0, queries, QUERY_BLOCK_SIZE):
            block = self._narrow(start, min(start + QUERY_BLOCK_SIZE, queries))
            output, probs = block.attend_with_probs(masked=True)
            outputs.append(output)
            observation = block.observation(slice(0, None), block.key.shape[2], probs)
            for accumulator in accumulators:
                accumulator.update(observation)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 3)

    def _narrow(self, start: int, stop: int) -> "AttentionInputs":
        """Return some of the queries, over the entries up to the last of them."""
        reach = self.key.shape[2] - self.query.shape[3] + stop
        return replace(
            self,
            query=self.query[:, :, :, start:stop],
            key=self.key[:, :, :reach],
            value=self.value[:, :, :reach],
            query_positions=self.query_positions[:, start:stop],
            key_positions=self.key_positions[..., :reach],
        )

    def attend_with_probs(self, masked: bool) -> tuple[GroupedQueries, AttentionProbs]:
        """Return output and probabilities of a few queries."""
        visible = None
        if masked:
            visible = visibility_mask(self.query_positions, self.key_positions[..., self._num_visible :])
        probs = attention_probs(self.query, self.key, visible, self.params, self.centroids)
        return attend_values(probs, self.value, self.centroids), self._without_centroids(probs)

    def observation(self, rows: slice, reach: int, probs: AttentionProbs | None = None) -> Observation:
        """Return these queries over the first `reach` entries; probabilities that are not given are computed on use."""
        query, queries = self.query[:, :, :, rows], self.query_positions[:, rows]
        key, entries = self.key[:, :, :reach], self.key_positions[..., :reach]
        num_visible = 0 if self.padded else self._num_visible + rows.start

        def compute_attention() -> AttentionProbs:
            attention = probs
            if attention is None:
                visible = visibility_mask(queries, entries[..., num_visible:])
                attention = self._without_centroids(attention_probs(query, key, visible, self.params, self.centroids))
            return torch.where(queries[:, None, None, :, None] >= 0, attention, 0) if self.padded else attention

        return Observation(
            query=query,
            key=key,
            value=self.value[:, :, :reach],
            query_positions=queries,
            key_positions=entries,
            previous_scores=key.new_zeros(()).expand(key.shape[:3]),
            scaling=self.params.scaling,
            compute_attention=compute_attention,
            stride=rows.step or 1,
            decoding=self.decoding,
        )

    @property
    def _num_visible(self) -> int:
        """Number of entries before the queries' own; without padding all of them are visible to every query."""
        return 0 if self.padded else self.key.shape[2] - self.query.shape[3]

    def _without_centroids(self, probs: Tensor) -> AttentionProbs:
        return probs if self.centroids is None else probs[..., self.centroids.key.shape[2] :]


def scores_after_decoding(
    eviction: Eviction,
    query: GroupedQueries,
    probs: AttentionProbs,
    query_positions: Int[Tensor, "#batch queries"],
    key_positions: Positions,
    scores: Float[Tensor, "batch heads entries"],
    scaling: float,
) -> Float[Tensor, "batch heads entries"]:
    """Return the scores after one decoded token of each row, of a method that observes its attention.

    Such methods read no keys or values then, so nothing is dequantized for them.
    """
    unread = probs.new_zeros(()).expand(*scores.shape, query.shape[4])
    return eviction.score(
        Observation(
            query=query,
            key=unread,
            value=unread,
            query_positions=query_positions,
            key_positions=key_positions,
            previous_scores=scores,
            scaling=scaling,
            compute_attention=lambda: probs,
            decoding=True,
        )
    )


def update_scores(
    inputs: AttentionInputs,
    sample: QuerySample,
    accumulators: Sequence[ScoreAccumulator],
    start: int = 0,
    prompt_tokens: int | None = None,
) -> None:
    """Update scores by those queries of a forward that are in the sample.

    Args:
        inputs: Queries and entries of the forward.
        sample: The queries of a prompt that all of these methods observe.
        accumulators: The methods and their scores.
        start: Position of the first query in its prompt.
        prompt_tokens: Length of the prompt; by default, the queries are all of it.
    """
    queries, entries = inputs.query.shape[3], inputs.key.shape[2]
    for rows in _sampled_blocks(start, start + queries, prompt_tokens or queries, sample):
        observation = inputs.observation(rows, entries - queries + rows.stop)
        for accumulator in accumulators:
            accumulator.update(observation)


def first_sampled_query(prompt_tokens: int, sample: QuerySample) -> int:
    """Return the position of a prompt's first query in the sample; the last query is always in it."""
    window = prompt_tokens if sample.window is None else min(max(1, sample.window), prompt_tokens)
    return prompt_tokens - window + (window - 1) % sample.stride


def _sampled_blocks(start: int, stop: int, prompt_tokens: int, sample: QuerySample) -> Iterator[slice]:
    """Yield the sampled queries from `start` to `stop` of a prompt in blocks, counted from `start`."""
    first = first_sampled_query(prompt_tokens, sample)
    first = max(first, start + (first - start) % sample.stride)
    step = sample.stride * (stop - start if sample.single_block else QUERY_BLOCK_SIZE)
    for begin in range(first - start, stop - start, step):
        last = min(begin + step - sample.stride, stop - start - 1)
        yield slice(begin, last + 1, sample.stride)
