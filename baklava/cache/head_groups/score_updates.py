"""Showing attention to eviction methods, block by block, so that no prompt's whole attention is ever held."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava.cache.attention import (
    QUERY_BLOCK,
    Attention,
    Grouped,
    Heads,
    Kernel,
    Positions,
    Summary,
    attend,
    probabilities,
    seen,
    weighted,
)
from baklava.eviction import Eviction, Observation, Sample


@dataclass(frozen=True)
class Scorekeeper:
    """An eviction method and the scores that it brings up to date, in place."""

    eviction: Eviction
    scores: Float[Tensor, "batch heads entries"]

    def take(self, observation: Observation) -> None:
        """Take in a block; what it computes is shared with other methods that take the same one."""
        scores = self.scores[..., : observation.key.shape[2]]
        scores.copy_(self.eviction.score(replace(observation, previous=scores)))


@dataclass(frozen=True)
class Forward:
    """What attends to what in one forward of a group of KV heads; the last entries are the queries' own.

    A `summary` stands for entries that are no longer held; who observes does not see it, but that it takes its share.
    """

    query: Grouped
    key: Heads
    value: Heads
    query_positions: Int[Tensor, "#batch queries"]
    key_positions: Positions
    kernel: Kernel
    padded: bool = False
    decoding: bool = False
    summary: Summary | None = None

    def attend(self, masked: bool) -> Grouped:
        """Output of all queries; `masked` False promises that nothing beyond causality is hidden."""
        positions = self.query_positions, self.key_positions
        return attend(self.query, self.key, self.value, *positions, self.kernel, masked=masked, summary=self.summary)

    def attend_and_show(self, masked: bool) -> tuple[Grouped, Attention]:
        """Output and probabilities of a few queries."""
        visible = seen(self.query_positions, self.key_positions) if masked else None
        attention = probabilities(self.query, self.key, visible, self.kernel, self.summary)
        return weighted(attention, self.value, self.summary), self._of_entries(attention)

    def observation(self, rows: slice, reach: int, attention: Attention | None = None) -> Observation:
        """These queries over the first `reach` entries; their attention, if not given, is computed when asked for."""
        query, queries = self.query[:, :, :, rows], self.query_positions[:, rows]
        key, entries = self.key[:, :, :reach], self.key_positions[..., :reach]
        # Without padding all that came before the first of these queries is seen by every one of them.
        sure = 0 if self.padded else self.key.shape[2] - self.query.shape[3] + rows.start

        def attend() -> Attention:
            made = attention
            if made is None:
                made = probabilities(query, key, seen(queries, entries[..., sure:]), self.kernel, self.summary)
                made = self._of_entries(made)
            return torch.where(queries[:, None, None, :, None] >= 0, made, 0) if self.padded else made

        return Observation(
            query=query,
            key=key,
            value=self.value[:, :, :reach],
            query_positions=queries,
            key_positions=entries,
            previous=key.new_zeros(()).expand(key.shape[:3]),
            scaling=self.kernel.scaling,
            attend=attend,
            stride=rows.step or 1,
            decoding=self.decoding,
        )

    def _of_entries(self, attention: Tensor) -> Attention:
        return attention if self.summary is None else attention[..., self.summary.key.shape[2] :]


def observe(
    forward: Forward, sample: Sample, keepers: Sequence[Scorekeeper], first: int = 0, prompt: int | None = None
) -> None:
    """Show a forward's queries, as far as they are in the sample, to methods that ask for the same sample.

    They are those from `first` on of a prompt of so many tokens; by default, all of it.
    """
    queries, entries = forward.query.shape[3], forward.key.shape[2]
    for rows in _blocks(first, first + queries, prompt or queries, sample):
        observation = forward.observation(rows, entries - queries + rows.stop)
        for keeper in keepers:
            keeper.take(observation)


def first_sampled(prompt: int, sample: Sample) -> int:
    """The first query of a prompt of so many tokens that is in the sample; the last one always is."""
    window = prompt if sample.window is None else min(max(1, sample.window), prompt)
    return prompt - window + (window - 1) % sample.stride


def _blocks(start: int, stop: int, prompt: int, sample: Sample) -> Iterator[slice]:
    """The sampled queries from `start` to `stop` of a prompt, in blocks, counted from `start`."""
    first = first_sampled(prompt, sample)
    first = max(first, start + (first - start) % sample.stride)
    step = sample.stride * (stop - start if sample.whole else QUERY_BLOCK)
    for begin in range(first - start, stop - start, step):
        last = min(begin + step - sample.stride, stop - start - 1)
        yield slice(begin, last + 1, sample.stride)
