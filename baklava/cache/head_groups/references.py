"""Reference queries: a prompt's own queries, moved to the place after it, and what the full cache answers them.

What will ask after a prompt is not known, but its own queries are good stand-ins once RoPE has moved them there: they
attend to the prompt as later queries do, and not to what is near. A block of the prompt moves as a whole. A query sees
all of the prompt, and the tokens of its own block up to itself for a second time, moved along with it. So what it gives
to its own block is what it gave before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from baklava.cache.attention import (
    UNKNOWN_ROTATION,
    AttentionParams,
    AttentionProbs,
    CentroidEntries,
    GroupedQueries,
    KVStates,
    Positions,
    attend_values,
)
from baklava.cache.kernels.prompt_attention import can_attend_prompt
from baklava.cache.kernels.reference_attention import attend_references
from baklava.errors import UserError
from baklava.eviction import AttentionMatching, Eviction, Observation

BLOCK_TOKENS = 512
"""Tokens of a prompt that are moved together."""


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Compute in 32 bits, under autocast too, and without gradients."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@dataclass(frozen=True, eq=False)
class ReferenceSample:
    """Which of a row's new tokens have reference queries, and where their blocks begin, counted in new tokens."""

    tokens: tuple[int, ...]
    starts: tuple[int, ...]

    @classmethod
    def spread(cls, count: int, num_tokens: int, num_padding: int = 0) -> "ReferenceSample":
        """Return `count` tokens, or all if there are fewer, spread evenly over those after the padding."""
        real = num_tokens - num_padding
        count = min(count, real)
        tokens = [index * real // count for index in range(count)]
        starts = [token - token % BLOCK_TOKENS + num_padding for token in tokens]
        return cls(tuple(token + num_padding for token in tokens), tuple(starts))

    def blocks(self) -> Iterator[tuple[int, slice]]:
        """Yield the start of each block and which references are in it."""
        first = 0
        for last, start in enumerate(self.starts, 1):
            if last == len(self.starts) or self.starts[last] != start:
                yield start, slice(first, last)
                first = last


@dataclass(frozen=True, eq=False)
class ReferenceQueries:
    """Reference queries of the new tokens of a forward.

    Attributes:
        query: the queries where they stand, padded with zeros in rows that have fewer.
        shifted: the queries after the prompt.
        samples: where they are, for each row, or once for all rows.
    """

    query: GroupedQueries
    shifted: GroupedQueries
    samples: tuple[ReferenceSample, ...]

    @classmethod
    def of(
        cls, query: GroupedQueries, samples: tuple[ReferenceSample, ...], num_tokens: int, params: AttentionParams
    ) -> "ReferenceQueries":
        """Return references from the queries at the samples, which are of `num_tokens` new tokens.

        Raises:
            UserError: how the layer rotates its queries is not known.
        """
        if params.rotary_shift is None:
            raise UserError(UNKNOWN_ROTATION)
        distances = torch.zeros(len(samples), query.shape[3], dtype=torch.long)
        for row, sample in enumerate(samples):
            distances[row, : len(sample.starts)] = num_tokens - torch.tensor(sample.starts, dtype=torch.long)
        shifted = params.rotary_shift.shift(query, distances)
        return cls(query.float(), shifted, samples)

    @classmethod
    def draw(
        cls, query: GroupedQueries, positions: Int[Tensor, "#batch tokens"], count: int, params: AttentionParams
    ) -> "ReferenceQueries":
        """Return `count` references of new tokens, of which those at negative positions are padding."""
        num_tokens = positions.shape[1]
        padding = (positions < 0).sum(1).tolist()
        samples = tuple(
            ReferenceSample.spread(count, num_tokens, own) if own < num_tokens else _NONE for own in padding
        )
        most = max(len(sample.tokens) for sample in samples)
        index = torch.zeros(len(samples), most, dtype=torch.long, device=query.device)
        is_real = torch.zeros(len(samples), most, dtype=torch.bool, device=query.device)
        for row, sample in enumerate(samples):
            index[row, : len(sample.tokens)] = torch.tensor(sample.tokens, dtype=torch.long, device=query.device)
            is_real[row, : len(sample.tokens)] = True
        index, is_real = (of[:, None, None, :, None] for of in (index, is_real))
        drawn = query.gather(3, index.expand(*query.shape[:3], most, query.shape[4])) * is_real
        return cls.of(drawn, samples, num_tokens, params)

    def for_heads(self, heads: slice | Int[Tensor, " heads"]) -> "ReferenceQueries":
        """Return the references of some of the KV heads."""
        return replace(self, query=self.query[:, heads], shifted=self.shifted[:, heads])


_NONE = ReferenceSample((), ())


@dataclass(frozen=True, eq=False)
class References:
    """Reference queries of a prompt, and the outputs that they should get from what is kept of it.

    All are in 32 bits. A query's own block and learned sinks stay with it, whatever is kept.

    Attributes:
        params: what their attention has in addition, without sinks, which are part of `own_log_sum`.
        query: the queries after the prompt.
        output: their outputs over all of the prompt and their own block.
        own_output: their outputs over their own block alone.
        own_log_sum: logarithm of the sum of exponentials over their own block.
        is_real: which of them there are; a row may have fewer than others.
    """

    params: AttentionParams
    query: GroupedQueries
    output: GroupedQueries
    own_output: GroupedQueries
    own_log_sum: Float[Tensor, "batch heads group queries"]
    is_real: Bool[Tensor, "#batch queries"]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors."""
        return self.query, self.output, self.own_output, self.own_log_sum, self.is_real

    def for_heads(self, heads: slice | Int[Tensor, " heads"]) -> "References":
        """Return the references of some of the KV heads."""
        return replace(
            self,
            query=self.query[:, heads],
            output=self.output[:, heads],
            own_output=self.own_output[:, heads],
            own_log_sum=self.own_log_sum[:, heads],
        )

    def thinned(self, count: int) -> "References":
        """Return about `count` of the references, evenly spread, without keeping the memory of the others."""
        step = max(1, self.query.shape[3] // count)
        if step == 1:
            return self
        return replace(
            self,
            query=self.query[:, :, :, ::step].contiguous(),
            output=self.output[:, :, :, ::step].contiguous(),
            own_output=self.own_output[:, :, :, ::step].contiguous(),
            own_log_sum=self.own_log_sum[:, :, :, ::step].contiguous(),
            is_real=self.is_real[:, ::step].contiguous(),
        )


@dataclass(frozen=True, eq=False)
class PromptEntries:
    """The entries that references look at: those from before, and the new tokens as the last ones.

    Attributes:
        key: their keys.
        value: their values.
        positions: their positions; negative for padding and empty slots.
        padded: whether there are such.
        centroids: entries that stand for evicted ones.
    """

    key: KVStates
    value: KVStates
    positions: Positions
    padded: bool = False
    centroids: CentroidEntries | None = None

    def row(self, row: int) -> "PromptEntries":
        """Return the entries of one row."""
        return self._narrow(0, slice(row, row + 1))

    def for_heads(self, heads: slice) -> "PromptEntries":
        """Return the entries of some of the KV heads."""
        return self._narrow(1, heads)

    def _narrow(self, dim: int, part: slice) -> "PromptEntries":
        """Return a part of the rows (0) or of the heads (1); positions may be the same for all."""
        index = (slice(None),) * dim + (part,)
        centroids = self.centroids and CentroidEntries(
            self.centroids.key[index], self.centroids.value[index], self.centroids.bias[index]
        )
        positions = self.positions[index] if self.positions.shape[dim] > 1 else self.positions
        return PromptEntries(self.key[index], self.value[index], positions, self.padded, centroids)


def observe_references(
    queries: ReferenceQueries,
    entries: PromptEntries,
    num_new: int,
    params: AttentionParams,
    methods: list[tuple[Eviction, Float[Tensor, "batch heads entries"]]],
) -> References:
    """Return what the entries answer the references, and update the scores of methods that observe these, in place.

    Args:
        queries: The reference queries.
        entries: The entries that they look at.
        num_new: How many of these are new; the queries are theirs.
        params: What the model's attention has in addition.
        methods: Eviction methods and the scores of the entries.
    """
    with exactly(entries.key.device):
        if len(queries.samples) == 1:
            return _observe(queries, queries.samples[0], entries, num_new, params, methods)
        rows = [
            _observe(
                replace(queries, query=queries.query[row : row + 1], shifted=queries.shifted[row : row + 1]),
                sample,
                entries.row(row),
                num_new,
                params,
                [(method, scores[row : row + 1]) for method, scores in methods],
            )
            for row, sample in enumerate(queries.samples)
        ]
    return References(rows[0].params, *(torch.cat(own) for own in zip(*(row.tensors for row in rows), strict=True)))


def _observe(
    queries: ReferenceQueries,
    sample: ReferenceSample,
    entries: PromptEntries,
    num_new: int,
    params: AttentionParams,
    methods: list[tuple[Eviction, Tensor]],
) -> References:
    """Do what `observe_references` does, with the same references in each row."""
    count = len(sample.tokens)
    own_output, own_log_sum = _attend_to_own_blocks(queries.query, sample, entries, num_new, params)
    output = torch.zeros_like(own_output)
    if count:
        own = own_output[:, :, :, :count], own_log_sum[:, :, :, :count]
        new = entries.positions[:, :1, entries.key.shape[2] - num_new :].flatten(1)
        observed = _Observed(queries.shifted[:, :, :, :count], *own, entries, new[:, list(sample.tokens)], params)
        is_known = all(type(method).score is AttentionMatching.score for method, _ in methods) and not entries.padded
        is_float32 = entries.value.dtype == torch.float32  # autocast gives values 16 bits
        is_compiled = is_known and is_float32 and can_attend_prompt(queries.shifted, entries.key)
        answer = observed.answer_compiled if is_compiled else observed.answer
        output[:, :, :, :count] = answer(methods)
    is_real = torch.arange(queries.query.shape[3], device=output.device) < count
    params = replace(params, sink_logits=None)
    return References(params, queries.shifted, output, own_output, own_log_sum, is_real[None])


@dataclass(frozen=True, eq=False)
class _Observed:
    """References, what their own blocks give them, and the entries that answer them."""

    query: GroupedQueries
    own_output: GroupedQueries
    own_log_sum: Float[Tensor, "batch heads group queries"]
    entries: PromptEntries
    positions: Int[Tensor, "#batch queries"]
    params: AttentionParams

    def answer_compiled(self, methods: list[tuple[Eviction, Tensor]]) -> GroupedQueries:
        """Return the outputs of the references, and update the scores of methods."""
        own, entries = (self.own_output, self.own_log_sum), self.entries
        output, errors, mass = attend_references(
            self.query, *own, entries.key, entries.value, self.params, entries.centroids, is_scored=bool(methods)
        )
        for method, scores in methods:
            assert isinstance(method, AttentionMatching)
            scores.copy_(method.blend(scores, errors, mass, self.query.shape[3]))
        return output

    def answer(self, methods: list[tuple[Eviction, Tensor]]) -> GroupedQueries:
        """Do the same in PyTorch, head by head, since the probabilities of all would be large."""
        outputs, entries = [], self.entries
        for head in range(entries.key.shape[1]):
            heads = slice(head, head + 1)
            logits, value = context_logits(self.query[:, heads], entries.for_heads(heads), self.params)
            own = self.own_log_sum[:, heads, :, :, None]
            total = torch.logaddexp(logits.logsumexp(-1, keepdim=True), own)
            probs = (logits - total).exp()
            output = attend_values(probs, value) + (own - total).exp() * self.own_output[:, heads]
            shares = probs[..., probs.shape[-1] - entries.key.shape[2] :]
            for method, scores in methods:
                scores[:, heads] = method.score(self._observation(heads, shares, output, scores[:, heads]))
            outputs.append(output)
        return torch.cat(outputs, 1)

    def _observation(self, heads: slice, attention: Tensor, output: Tensor, before: Tensor) -> Observation:
        entries = self.entries.for_heads(heads)
        return Observation(
            query=self.query[:, heads],
            key=entries.key,
            value=entries.value,
            query_positions=self.positions,
            key_positions=entries.positions,
            previous_scores=before,
            scaling=self.params.scaling,
            compute_attention=lambda: attention,
            output=output,
        )


def context_logits(
    query: GroupedQueries, entries: PromptEntries, params: AttentionParams
) -> tuple[AttentionProbs, KVStates]:
    """Return the logits of references over the centroids and entries, in 32 bits, and the values of these."""
    key, value = entries.key.float(), entries.value.float()
    bias = key.new_zeros(key.shape[:3])
    if entries.padded:
        bias = bias.masked_fill(entries.positions < 0, -torch.inf)
    if (centroids := entries.centroids) is not None:
        key = torch.cat([centroids.key.float(), key], 2)
        value = torch.cat([centroids.value.float(), value], 2)
        bias = torch.cat([centroids.bias.float(), bias], 2)
    logits = params.apply_softcap((query.flatten(2, 3) * params.scaling) @ key.transpose(2, 3))
    return (logits + bias[:, :, None]).view(*query.shape[:4], -1), value


def _attend_to_own_blocks(
    query: GroupedQueries, sample: ReferenceSample, entries: PromptEntries, num_new: int, params: AttentionParams
) -> tuple[GroupedQueries, Tensor]:
    """Return outputs and logarithms of sums of exponentials over the queries' own blocks, sinks included."""
    output = query.new_zeros(query.shape)
    log_sum = query.new_zeros(query.shape[:4])
    first = entries.key.shape[2] - num_new
    for start, own in sample.blocks():
        tokens = torch.tensor(sample.tokens[own], device=query.device)
        block = slice(first + start, first + sample.tokens[own.stop - 1] + 1)
        key, value = entries.key[:, :, block].float(), entries.value[:, :, block].float()
        own_query = query[:, :, :, own]
        logits = params.apply_softcap((own_query.flatten(2, 3) * params.scaling) @ key.transpose(2, 3))
        logits = logits.view(*own_query.shape[:4], -1)
        seen = torch.arange(start, start + key.shape[2], device=query.device) <= tokens[:, None]
        logits = logits.masked_fill(~seen, -torch.inf)
        sums = logits.logsumexp(-1)
        if params.sink_logits is not None:
            sums = torch.logaddexp(sums, params.sink_logits.float().view(1, *query.shape[1:3], 1))
        output[:, :, :, own] = ((logits - sums[..., None]).exp().flatten(2, 3) @ value).view(own_query.shape)
        log_sum[:, :, :, own] = sums
    return output, log_sum
