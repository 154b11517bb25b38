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
    RingWindow,
    attend,
    attend_values,
    attention_probs,
    visibility_mask,
)
from baklava.cache.kernels.prompt_attention import ScoreSum, attend_prompt, can_attend_prompt
from baklava.eviction import Eviction, HeavyHitter, Observation, QuerySample


@dataclass(frozen=True, eq=False)
class ScoreAccumulator:
    """An eviction method, the scores that it updates in place, and the queries of a prompt that it observes."""

    eviction: Eviction
    scores: Float[Tensor, "batch heads entries"]
    sample: QuerySample

    @classmethod
    def of_prompt(
        cls, eviction: Eviction, scores: Float[Tensor, "batch heads entries"], sample: QuerySample
    ) -> "ScoreAccumulator":
        """Return the method as it observes a prompt's queries where they stand, neither moved nor repeated."""
        return cls(eviction.decoding, scores, replace(sample, references=0, uses_repetition=False))

    def update(self, observation: Observation) -> None:
        """Update the scores by one block of queries; methods that get the same block share what it computes."""
        scores = self.scores[..., : observation.key.shape[2]]
        scores.copy_(self.eviction.score(replace(observation, previous_scores=scores)))


@dataclass(frozen=True)
class AttentionInputs:
    """Queries and entries of one forward of a group of KV heads; the last entries are the queries' own.

    `centroids` stand for evicted entries. Eviction methods do not observe them, but the attention that the centroids
    get is missing from that of the entries. `window` is what the ring buffer of each query would have.
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
    window: RingWindow | None = None

    def copy(self) -> "AttentionInputs":
        """Return the same with entries in memory of their own."""
        key, value, positions = (states.clone() for states in (self.key, self.value, self.key_positions))
        centroids = self.centroids and self.centroids.copy()
        return replace(self, key=key, value=value, key_positions=positions, centroids=centroids)

    def of_last(self, query: GroupedQueries, params: AttentionParams) -> "AttentionInputs":
        """Return the same entries with other queries of the last tokens."""
        positions = self.query_positions[:, -query.shape[3] :]
        return replace(self, query=query, query_positions=positions, params=params)

    def attend(self, masked: bool) -> GroupedQueries:
        """Return the output of all queries; `masked` is as in `attention.attend`."""
        is_prompt = self.query.shape[3] > 1 and (masked or self.params.fp32_precision is not None)
        if is_prompt and self._is_compiled:
            return attend_prompt(self.query, self.key, self.value, self.params, self.centroids)
        entries = self.key, self.value, self.query_positions, self.key_positions
        return attend(self.query, *entries, self.params, masked=masked, window=self.window, centroids=self.centroids)

    def attend_and_observe(
        self, accumulators: Sequence[ScoreAccumulator], masked: bool, start: int = 0, prompt_tokens: int | None = None
    ) -> GroupedQueries:
        """Return the output of all queries, and update scores by those in the samples of the methods.

        Where it can be, the attention is computed once for both.

        Args:
            accumulators: The methods and their scores.
            masked: As in `attention.attend`.
            start: Position of the first query in its prompt.
            prompt_tokens: Length of the prompt; by default, the queries are all of it.
        """
        if self._is_compiled:
            shared = [each for each in accumulators if type(each.eviction) is HeavyHitter]
            output = self._attend_and_sum(shared, start, prompt_tokens) if shared else self.attend(masked)
        else:
            # Fused attention is more exact in 16 bits, but it needs a mask unless this is a whole prompt.
            shared = [each for each in accumulators if masked and each.sample == QuerySample()]
            output = self._attend_in_blocks(shared) if shared else self.attend(masked)
        others = [each for each in accumulators if each not in shared]
        for sample in dict.fromkeys(each.sample for each in others):
            own = [each for each in others if each.sample == sample]
            update_scores(self, sample, own, start, prompt_tokens)
        return output

    @property
    def _is_compiled(self) -> bool:
        return not self.padded and self.window is None and can_attend_prompt(self.query, self.key)

    def _attend_and_sum(
        self, accumulators: Sequence[ScoreAccumulator], start: int, prompt_tokens: int | None
    ) -> GroupedQueries:
        """Return the output of all queries, and update the scores of heavy hitters."""
        num_queries, observed = self.query.shape[3], []
        for each in accumulators:
            sampled = _sampled_queries(start, start + num_queries, prompt_tokens or num_queries, each.sample)
            if len(sampled):
                observed.append((each, self.query_positions[0, sampled], self._score_sum(each.eviction, sampled)))
        scores = [score for _, _, score in observed]
        output = attend_prompt(self.query, self.key, self.value, self.params, self.centroids, scores)
        for each, positions, score in observed:
            before = each.scores[..., : self.key.shape[2]]
            ends = positions[0], positions[-1], self.key_positions
            assert isinstance(each.eviction, HeavyHitter)
            new = score.sums.view_as(before)
            before.copy_(each.eviction.running_mean(before, new, *ends, each.sample.stride))
        return output

    def _score_sum(self, eviction: Eviction, sampled: range) -> ScoreSum:
        """Return the sums of a heavy hitter, before any query, over those that it observes."""
        assert isinstance(eviction, HeavyHitter)
        queries, sums = self.query_positions[0].int(), torch.zeros(self.key.shape[:3]).flatten(0, 1)
        weights = torch.zeros(len(queries))
        weights[sampled.start :: sampled.step] = 1
        entries = self.key_positions.expand(self.key.shape[:3]).reshape(sums.shape).int()
        rule = eviction.distance, eviction.power == 2, eviction.reduction == "max"
        return ScoreSum(weights, *rule, sums, queries, entries)

    def _attend_in_blocks(self, accumulators: Sequence[ScoreAccumulator]) -> GroupedQueries:
        """Return the output of all queries, and update scores that observe every one of them, block by block."""
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


def _sampled_queries(start: int, stop: int, prompt_tokens: int, sample: QuerySample) -> range:
    """Return the sampled queries from `start` to `stop` of a prompt, counted from `start`."""
    first = first_sampled_query(prompt_tokens, sample)
    first = max(first, start + (first - start) % sample.stride)
    return range(first - start, stop - start, sample.stride)


def _sampled_blocks(start: int, stop: int, prompt_tokens: int, sample: QuerySample) -> Iterator[slice]:
    """Yield the sampled queries from `start` to `stop` of a prompt in blocks, counted from `start`."""
    sampled = _sampled_queries(start, stop, prompt_tokens, sample)
    size = len(sampled) if sample.single_block else QUERY_BLOCK_SIZE
    for begin in range(0, len(sampled), max(1, size)):
        block = sampled[begin : begin + size]
        yield slice(block[0], block[-1] + 1, sample.stride)
