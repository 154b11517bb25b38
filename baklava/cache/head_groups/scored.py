"""Entries that compete by score."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool1d
from typing_extensions import override

from baklava.cache import table_columns as columns
from baklava.cache.attention import AttentionParams, AttentionProbs, CentroidEntries, GroupedQueries, KVStates
from baklava.cache.head_groups.base import GroupBudget, HeadGroup, NewTokens
from baklava.cache.head_groups.centroids import PROMPT_KMEANS_ITERATIONS, Centroids, mean_attention
from baklava.cache.head_groups.references import PromptEntries, References, exactly, observe_references
from baklava.cache.head_groups.score_updates import (
    AttentionInputs,
    ScoreAccumulator,
    scores_after_decoding,
    update_scores,
)
from baklava.cache.head_groups.table import Rows, addresses
from baklava.cache.head_groups.value_fit import fit_values
from baklava.cache.kernels.compiled_entries import merge_entries
from baklava.cache.score_predictor import mix_orders
from baklava.cache.storage import EMPTY, TensorSpec
from baklava.cache.storage.base import gather_new
from baklava.errors import UserError
from baklava.eviction import Eviction, HeavyHitter, QuerySample
from baklava.plan.geometry import FULL_BITS

MAX_FITTED_SHARE = 0.9
"""Values are not fitted if more of the entries stay: there is little to gain."""


class ScoredHeadGroup(HeadGroup):
    """Entries that compete by score. New tokens fill the slots after the retained entries, then the lowest scores go.

    Slots [0, num_filled) are filled in every row and head. An eviction moves entries from the end into the slots of
    evicted ones, so it copies at most `eviction_interval` entries.
    """

    def __init__(
        self, budget: GroupBudget, eviction: Eviction, template: KVStates, max_tokens: int | None = None
    ) -> None:
        super().__init__(budget, eviction, template, max_tokens)
        self.num_retained = budget.tokens - eviction.eviction_interval
        is_dense = min(budget.key_bits, budget.value_bits) >= FULL_BITS
        self.residual_start = self.num_retained if is_dense else min(self.num_retained, self.layout.residual_start)
        """First slot of those whose entries keep their order: an eviction moves the oldest of them to holes before."""
        self.positions: Int[Tensor, "batch heads slots"] = torch.empty(0, 0, 0)
        self.scores: Float[Tensor, "batch heads slots"] = torch.empty(0, 0, 0)
        self.centroids: Centroids | None = None

    @override
    def _state_specs(self) -> list[TensorSpec]:
        heads, count = len(self.budget.heads), self.eviction.centroids
        shape = (heads, self.num_slots)
        centroids = Centroids.specs(heads, count, self.head_dim) if count else []
        return [TensorSpec(shape, torch.int32), TensorSpec(shape, torch.float32), *centroids]

    @override
    def _bind_state(self, tensors: Iterator[Tensor]) -> None:
        self.positions, self.scores = next(tensors), next(tensors)
        self.centroids = Centroids.bind(tensors) if self.eviction.centroids else None

    @override
    def _describe_state(self, rows: Rows) -> None:
        eviction = self.eviction
        rows[..., columns.UPDATE] = self.score_update
        if self.score_update == columns.HEAVY_HITTER:
            hitter = eviction.decoding
            assert isinstance(hitter, HeavyHitter)
            rows[..., columns.DISTANCE] = hitter.distance
            rows[..., columns.SQUARED], rows[..., columns.BY_MAX] = hitter.power == 2, hitter.reduction == "max"
        rows[..., columns.EVICTS] = not self.needs_pytorch
        rows[..., columns.INTERVAL], rows[..., columns.RETAINED] = eviction.eviction_interval, self.num_retained
        rows[..., columns.RESIDUAL_START] = self.residual_start
        rows[..., columns.RECENT_WINDOW] = eviction.recent_window(self.budget.tokens)
        rows[..., columns.POWER] = np.float32(eviction.attention_power).view(np.int32)
        rows[..., columns.POSITIONS], rows[..., columns.SCORES] = addresses(self.positions), addresses(self.scores)
        if self.centroids is not None:
            rows[..., columns.CENTROIDS] = self.centroids.key.shape[2]
            for column, tensor in enumerate(self.centroids.tensors, columns.CENTROID_KEY):
                rows[..., column] = addresses(tensor)

    @property
    def score_update(self) -> int:
        """What a kernel does with the probabilities of a decoded token: it knows HeavyHitter, and no subclass."""
        if type(self.eviction.decoding) is HeavyHitter:
            return columns.HEAVY_HITTER
        return columns.NO_UPDATE if self.eviction.query_sample.window == 0 else columns.KEEP_PROBS

    @property
    def needs_pytorch(self) -> bool:
        """Whether kernels leave new scores or evictions to PyTorch."""
        return self.score_update != columns.HEAVY_HITTER or self.eviction.pooling > 1

    @property
    def tokens_since_eviction(self) -> int:
        """Tokens that were stored and scored since the last time at which entries could be evicted."""
        return self._counter(columns.SINCE_EVICTION)

    @tokens_since_eviction.setter
    def tokens_since_eviction(self, tokens: int) -> None:
        self._count(columns.SINCE_EVICTION, tokens)

    @override
    def _attend(self, tokens: NewTokens, params: AttentionParams) -> GroupedQueries:
        if self.is_prompt(tokens):
            return self._block(tokens, params)
        if tokens.num_tokens == 1:
            return self._step(tokens, params)
        outputs, start = [], 0
        while start < tokens.num_tokens:
            stop = min(start + self.tokens_until_eviction, tokens.num_tokens)
            outputs.append(self._step(tokens.narrow(start, stop), params))
            start = stop
        return torch.cat(outputs, 3)

    def _step(self, tokens: NewTokens, params: AttentionParams) -> GroupedQueries:
        """Attend with tokens up to the next eviction, for which there are slots."""
        self._append(tokens)
        inputs = self._inputs(tokens, params)
        masked = tokens.num_tokens > 1 or tokens.padded
        self._share(inputs, masked, stored=True)
        if self.eviction.query_sample.window == 0:
            output = inputs.attend(masked)
        else:
            output, probs = inputs.attend_with_probs(masked)
            self._accumulator().update(inputs.observation(slice(0, None), self.num_filled, probs))
        if self.eviction.query_sample.window == 0 and self.is_about_to_evict(tokens.num_tokens):
            update_scores(inputs, self.eviction.query_sample, [self._accumulator()])
        self.maybe_evict(tokens.num_tokens)
        return output

    def observe_attention(self, query: GroupedQueries, probs: AttentionProbs, position: int, scaling: float) -> None:
        """Update the scores by the attention of decoded tokens, the first of which is at this position."""
        scores = self.scores[..., : self.num_filled]
        at = torch.arange(position, position + query.shape[3], device=query.device)[None]
        scores.copy_(
            scores_after_decoding(self.eviction.decoding, query, probs, at, self.cached_positions(), scores, scaling)
        )

    def observe_entries(self, tokens: NewTokens, params: AttentionParams) -> None:
        """Update scores that depend on keys and values alone, before an eviction."""
        update_scores(self._inputs(tokens, params), self.eviction.query_sample, [self._accumulator()])

    def is_about_to_evict(self, num_new: int = 1) -> bool:
        """Return whether `maybe_evict` would evict entries after these tokens, which are stored already."""
        is_due = self.tokens_since_eviction + num_new >= self.eviction.eviction_interval
        return is_due and self.num_filled > self.num_retained

    @property
    def tokens_until_eviction(self) -> int:
        """How many tokens are stored and scored before an eviction."""
        return self.eviction.eviction_interval - self.tokens_since_eviction

    def count_tokens(self, num_new: int) -> bool:
        """Count tokens that have been stored and scored; return whether entries have to be evicted now."""
        is_due = self.is_about_to_evict(num_new)
        self.tokens_since_eviction = (self.tokens_since_eviction + num_new) % self.eviction.eviction_interval
        return is_due

    def maybe_evict(self, num_new: int = 1) -> None:
        """Count tokens that have been stored and scored, and evict after `eviction_interval` of them."""
        if self.count_tokens(num_new):
            self._evict()

    def _append(self, tokens: NewTokens) -> None:
        start, self.num_filled = self.num_filled, self.num_filled + tokens.num_tokens
        self.scores[:, :, start : self.num_filled] = 0
        if tokens.padded:
            self._scatter(tokens, start)
            return
        self.keys.write(start, tokens.key)
        self.values.write(start, tokens.value)
        self.positions[:, :, start : self.num_filled] = tokens.positions[:, None]

    def _scatter(self, tokens: NewTokens, start: int) -> None:
        """Append to padded rows: missing sinks of a row go to the slots of the sinks, which are empty in that row."""
        appended = torch.arange(start, self.num_filled, device=tokens.key.device)
        early = (tokens.positions >= 0) & (tokens.positions < min(self.eviction.sinks, start))
        slots = torch.where(early, tokens.positions, appended)[:, None].expand(tokens.key.shape[:3])
        self.keys.scatter(slots, tokens.key)
        self.values.scatter(slots, tokens.value)
        self.positions[:, :, start : self.num_filled] = EMPTY
        self.positions.scatter_(2, slots, tokens.positions[:, None].expand_as(slots).int())
        self.scores.scatter_(2, slots, 0.0)

    def _inputs(self, tokens: NewTokens, params: AttentionParams) -> AttentionInputs:
        key, value = self.read()
        entries = (key, value, tokens.positions, self.cached_positions(), params, tokens.padded)
        return AttentionInputs(tokens.query, *entries, decoding=True, centroids=self._centroid_entries(tokens))

    def _centroid_entries(self, tokens: NewTokens) -> CentroidEntries | None:
        return None if self.centroids is None else self.centroids.entries(tokens.query.dtype)

    def _block(self, tokens: NewTokens, params: AttentionParams) -> GroupedQueries:
        """Attend with more tokens than fit: they attend to all entries and each other, then all entries compete."""
        shape = (*tokens.key.shape[:2], tokens.num_tokens)
        key, value = tokens.key, tokens.value
        if self.num_filled:
            key, value = (torch.cat(pair, 2) for pair in zip(self.read(), (key, value), strict=True))
        positions = torch.cat([self.cached_positions(), tokens.positions[:, None].expand(shape).int()], 2)
        scores = torch.cat([self.scores[..., : self.num_filled], self.scores.new_zeros(shape)], 2)
        # The positions of a first prompt are the same for all heads, and so is their mask.
        key_positions = positions if self.num_filled else tokens.positions[:, None]
        centroids = self._centroid_entries(tokens) if self.num_filled else None
        inputs = AttentionInputs(
            tokens.query, key, value, tokens.positions, key_positions, params, tokens.padded, centroids=centroids
        )
        masked = bool(self.num_filled or tokens.padded)
        self._share(inputs, masked, stored=self.num_filled > 0)
        sample, references = self._prompt_sample(), None
        output = inputs.attend_and_observe([ScoreAccumulator.of_prompt(self.eviction, scores, sample)], masked)
        if tokens.references is not None:
            prompt = PromptEntries(key, value, key_positions, tokens.padded, centroids)
            methods = [(self.eviction, scores)] if sample.references else []
            references = observe_references(tokens.references, prompt, tokens.num_tokens, params, methods)
        if tokens.predicted is not None:
            new = scores[..., -tokens.num_tokens :]
            is_real = tokens.positions[:, None] >= 0
            new.copy_(mix_orders(new, tokens.predicted, self.eviction.predicted_share, is_real))
        self._retain(tokens.key, tokens.value, scores, positions, references)
        return output

    def _prompt_sample(self) -> QuerySample:
        sample = self.eviction.query_sample
        if sample.uses_repetition and not self.num_filled:
            raise UserError(
                f"{self.eviction.name} scores a prompt while the model repeats it, which a plain forward does not do; "
                "start the cache with baklava.runtime.prefill.prefill(loaded, plan, ids)"
            )
        return QuerySample() if sample.uses_repetition else sample

    @override
    def _load_prompt(
        self,
        key: KVStates,
        value: KVStates,
        score: Tensor | None,
        positions: Int[Tensor, "#batch tokens"],
        references: References | None,
    ) -> None:
        if score is None:
            raise ValueError(f"{self.eviction.name} needs the scores of the prompt, and none were recorded")
        self._retain(key, value, score, positions[:, None].expand(score.shape).int(), references)

    def _retain(
        self, key: KVStates, value: KVStates, scores: Tensor, positions: Tensor, references: References | None
    ) -> None:
        """Retain the best of the old entries and these new ones, in their order, and fit their values."""
        num_old = self.num_filled
        retained = self._topk(scores, positions)
        if self.centroids is not None and retained.shape[2] < positions.shape[2]:
            self._merge(self.centroids, key, value, self._weights(scores, positions).scatter(2, retained, 0.0))
        scores, positions = scores.gather(2, retained), positions.gather(2, retained)
        self._replace(key, value, torch.where(positions < 0, EMPTY, retained))
        self.positions[..., : self.num_filled], self.scores[..., : self.num_filled] = positions, scores
        self.tokens_since_eviction = 0
        num_entries = num_old + key.shape[2]
        if references is not None and self.eviction.fit_references and self._is_worth_fitting(num_entries):
            with exactly(key.device):
                self._fit(value, retained, num_old, references.thinned(self.eviction.fit_references))

    def _is_worth_fitting(self, num_entries: int) -> bool:
        """Return whether so much of these entries has been evicted that the values of the others can make up for it."""
        return self.num_filled < MAX_FITTED_SHARE * num_entries

    def _fit(self, value: KVStates, retained: Tensor, num_old: int, references: References) -> None:
        """Fit the values of the centroids and of those entries that are not recent to references.

        Args:
            value: Values of the new entries.
            retained: Index of the entries into the `num_old` ones before and the new ones.
            num_old: As above.
            references: Queries and the outputs that they should get.
        """
        (keys, values), positions, first = self.read(), self.cached_positions(), self.eviction.centroids
        origin = torch.where((retained >= num_old)[..., None], gather_new(retained, num_old, value), values).float()
        last, recent_window = positions.amax(2, keepdim=True), self.eviction.recent_window(self.budget.tokens)
        is_fitted = (positions >= 0) & (positions <= last - recent_window)
        centroids = None
        if self.centroids is not None:
            centroids = self.centroids.entries(torch.float32)
            origin = torch.cat([centroids.value, origin], 2)
            is_fitted = torch.cat([self.centroids.weight > 0, is_fitted], 2)
        kept = PromptEntries(keys, values, positions, bool((positions < 0).any()), centroids)
        slots = torch.arange(self.num_filled, device=keys.device)[None, None]

        def store(columns: Tensor) -> Tensor:
            entries = self.values.round_trip(columns[:, :, first:].to(values.dtype), slots).float()
            return torch.cat([columns[:, :, :first].half().float(), entries], 2)

        fitted, gains = fit_values(references, kept, origin, is_fitted, self.eviction.fit_ridge, store)
        is_fitted = is_fitted & gains[..., None]
        self.values.replace(fitted[:, :, first:].to(values.dtype), is_fitted[..., first:])
        if self.centroids is not None:
            means = self.centroids.value
            means.copy_(torch.where(is_fitted[..., :first, None], fitted[:, :, :first].half(), means))

    def _merge(self, centroids: Centroids, key: KVStates, value: KVStates, weights: Tensor) -> None:
        """Merge those of the old entries and these new ones that have a weight into the centroids."""
        if self._runs_compiled:
            merge_entries(self.addresses, weights, self.num_filled, key, value, PROMPT_KMEANS_ITERATIONS)
            return
        keys, values = (
            torch.cat([storage.read(self.num_filled), new], 2) if self.num_filled else new
            for storage, new in ((self.keys, key), (self.values, value))
        )
        centroids.copy_(centroids.merge(keys, values, weights, PROMPT_KMEANS_ITERATIONS))

    def _topk(self, scores: Tensor, positions: Tensor) -> Tensor:
        entries = positions.shape[2]
        num_retained = min(entries, self.num_retained)
        retained = self._rank(scores, positions).topk(num_retained, sorted=False).indices
        # Padding goes last, so that a padded row has its sinks in the same slots as all others.
        padding = positions.gather(2, retained) < 0
        return (retained + padding * entries).sort().values % entries

    def _evict(self) -> None:
        rank = self._rank(self.scores[..., : self.num_filled], self.cached_positions())
        # Stable, so that of equal scores the same ones go in all implementations.
        evicted = rank.argsort(stable=True)[..., : self.num_filled - self.num_retained].sort().values
        if self.centroids is not None:
            weights = self._weights(self.scores.gather(2, evicted), self.positions.gather(2, evicted))
            self.centroids.copy_(self.centroids.merge(self.keys.gather(evicted), self.values.gather(evicted), weights))
        source, target = _compaction_moves(evicted, self.residual_start, self.num_filled)
        for storage in (self.keys, self.values):
            storage.move(source, target)
        for state in (self.positions, self.scores):
            state.scatter_(2, target, state.gather(2, source))
        self.num_filled = self.num_retained

    def _weights(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Return the weights of entries among the members of a centroid: the attention that they had."""
        return mean_attention(scores, self.eviction).masked_fill(positions < 0, 0)

    def _accumulator(self) -> ScoreAccumulator:
        return ScoreAccumulator(self.eviction.decoding, self.scores[..., : self.num_filled], self.eviction.query_sample)

    def _rank(self, scores: Tensor, positions: Tensor) -> Tensor:
        last = positions.amax(2, keepdim=True)
        recent_window = self.eviction.recent_window(self.budget.tokens)
        scores = _pool(scores, positions, self.eviction.pooling)
        protected = (positions < self.eviction.sinks) | (positions > last - recent_window)
        return scores.masked_fill(protected, torch.inf).masked_fill(positions < 0, -torch.inf)

    @override
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Do nothing: all that differs between rows is in the tensors."""

    @override
    def cached_positions(self) -> Int[Tensor, "batch heads entries"]:
        return self.positions[..., : self.num_filled]


def _compaction_moves(evicted: Tensor, start: int, num_filled: int) -> tuple[Tensor, Tensor]:
    """Return source and target slots of the moves that leave no hole where entries were evicted.

    The entries from slot `start` on move in their order: into the holes before `start`, then from `start` on. Rows
    differ in how many of them were evicted; the last moves of a row move an entry onto itself.

    Args:
        evicted: Sorted slots of evicted entries [batch, heads, evicted].
        start: A slot, after which as many entries follow as are evicted, or more.
        num_filled: Entries before the eviction.
    """
    index = torch.arange(num_filled - start, device=evicted.device)
    is_evicted = (index[:, None] + start == evicted[:, :, None]).any(-1)
    holes = (evicted < start).sum(2, keepdim=True)
    into = evicted.gather(2, index.clamp(max=evicted.shape[2] - 1).expand(*evicted.shape[:2], -1))
    target = torch.where(index < holes, into, start + index - holes)
    source = is_evicted.int().argsort(dim=2, stable=True) + start
    return torch.where(index < len(index) - is_evicted.sum(2, keepdim=True), source, target), target


def _pool(scores: Tensor, positions: Tensor, width: int) -> Tensor:
    """Return means over `width` entries, in the order of their positions; padding does not count."""
    if width == 1:
        return scores
    order = positions.argsort(dim=2)
    real = (positions >= 0).to(scores.dtype)
    sums, counts = (
        avg_pool1d(terms.gather(2, order), width, stride=1, padding=width // 2)
        for terms in (scores.masked_fill(positions < 0, 0), real)
    )
    return (sums / counts.clamp(min=1 / width)).gather(2, order.argsort(dim=2))
