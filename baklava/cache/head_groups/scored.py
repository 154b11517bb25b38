"""Entries that compete by score."""

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import avg_pool1d
from typing_extensions import override

from baklava.cache.attention import AttentionParams, CentroidEntries, GroupedQueries, KVStates
from baklava.cache.head_groups.base import GroupBudget, HeadGroup, NewTokens
from baklava.cache.head_groups.centroids import PROMPT_KMEANS_ITERATIONS, Centroids, mean_attention
from baklava.cache.head_groups.score_updates import AttentionInputs, ScoreAccumulator, update_scores
from baklava.cache.storage import EMPTY
from baklava.errors import UserError
from baklava.eviction import Eviction, Sample


class ScoredHeadGroup(HeadGroup):
    """Entries that compete by score. New tokens fill the slack behind the kept ones; when it is full, the losers go.

    Slots [0, filled) are in use in every row and head. An eviction moves the winners of the slack into the slots of
    the losers, so it copies at most `interval` entries.
    """

    def __init__(
        self, budget: GroupBudget, eviction: Eviction, template: KVStates, max_tokens: int | None = None
    ) -> None:
        super().__init__(budget, eviction, template, max_tokens)
        shape = (template.shape[0], len(budget.heads), 0)
        self.positions = torch.empty(shape, dtype=torch.int32, device=template.device)
        self.scores = torch.empty(shape, dtype=torch.float32, device=template.device)
        self.tokens_since_eviction = 0
        self.num_retained = budget.tokens - eviction.interval
        self.centroids = (
            Centroids.empty(template, len(budget.heads), eviction.centroids) if eviction.centroids else None
        )

    @override
    def _attend(self, tokens: NewTokens, params: AttentionParams) -> GroupedQueries:
        if not tokens.teacher_forced and (not self.num_filled or tokens.num_tokens > self.eviction.interval):
            return self._block(tokens, params)
        if tokens.num_tokens == 1:
            return self._step(tokens, params)
        outputs, start = [], 0
        while start < tokens.num_tokens:
            stop = min(start + self.eviction.interval - self.tokens_since_eviction, tokens.num_tokens)
            outputs.append(self._step(tokens.narrow(start, stop), params))
            start = stop
        return torch.cat(outputs, 3)

    def _step(self, tokens: NewTokens, params: AttentionParams) -> GroupedQueries:
        """Tokens up to the next eviction at most; the slack has room for them."""
        self._append(tokens)
        forward = self._forward(tokens, params)
        masked = tokens.num_tokens > 1 or tokens.padded
        if self.eviction.sample.window == 0:
            output = forward.attend(masked)
        else:
            output, attention = forward.attend_with_probs(masked)
            self._accumulator().update(forward.observation(slice(0, None), self.num_filled, attention))
        due = (
            self.tokens_since_eviction + tokens.num_tokens >= self.eviction.interval
            and self.num_filled > self.num_retained
        )
        if due and self.eviction.sample.window == 0:
            update_scores(forward, self.eviction.sample, [self._accumulator()])
        self.maybe_evict(tokens.num_tokens)
        return output

    def reserve_slot(self) -> None:
        """A slot for a token of a sequence without padding, which is about to be written and scored."""
        self._grow(self.num_filled + 1)
        self.num_filled += 1

    def maybe_evict(self, tokens: int = 1) -> None:
        """So many tokens have been taken in, attended to and scored: evict, if it is time."""
        self.tokens_since_eviction += tokens
        if self.tokens_since_eviction >= self.eviction.interval:
            self._evict()

    def _append(self, tokens: NewTokens) -> None:
        start, self.num_filled = self.num_filled, self.num_filled + tokens.num_tokens
        self._grow(self.num_filled)
        self.scores[:, :, start : self.num_filled] = 0
        if tokens.padded:
            self._scatter(tokens, start)
            return
        self.keys.write(start, tokens.key)
        self.values.write(start, tokens.value)
        self.positions[:, :, start : self.num_filled] = tokens.positions[:, None]

    def _scatter(self, tokens: NewTokens, start: int) -> None:
        """Append to rows of which some may lack sinks still: those go where other rows have theirs, which is empty."""
        behind = torch.arange(start, self.num_filled, device=tokens.key.device)
        early = (tokens.positions >= 0) & (tokens.positions < min(self.eviction.sinks, start))
        slots = torch.where(early, tokens.positions, behind)[:, None].expand(tokens.key.shape[:3])
        self.keys.scatter(slots, tokens.key)
        self.values.scatter(slots, tokens.value)
        self.positions[:, :, start : self.num_filled] = EMPTY
        self.positions.scatter_(2, slots, tokens.positions[:, None].expand_as(slots).int())
        self.scores.scatter_(2, slots, 0.0)

    def _forward(self, tokens: NewTokens, params: AttentionParams) -> AttentionInputs:
        key, value = self.keys.read(self.num_filled), self.values.read(self.num_filled)
        held = (key, value, tokens.positions, self.cached_positions(), params, tokens.padded)
        return AttentionInputs(tokens.query, *held, decoding=True, centroids=self._summary(tokens))

    def _summary(self, tokens: NewTokens) -> CentroidEntries | None:
        return None if self.centroids is None else self.centroids.entries(tokens.query.dtype)

    def _block(self, tokens: NewTokens, params: AttentionParams) -> GroupedQueries:
        """Many tokens: they attend to everything held and to each other, then all compete."""
        shape = (*tokens.key.shape[:2], tokens.num_tokens)
        key = torch.cat([self.keys.read(self.num_filled), tokens.key], 2)
        value = torch.cat([self.values.read(self.num_filled), tokens.value], 2)
        positions = torch.cat([self.cached_positions(), tokens.positions[:, None].expand(shape).int()], 2)
        scores = torch.cat([self.scores[..., : self.num_filled], self.scores.new_zeros(shape)], 2)
        # The entries of a first prompt are the same for all heads, and so is what is seen of them.
        common = positions if self.num_filled else tokens.positions[:, None]
        centroids = self._summary(tokens) if self.num_filled else None
        forward = AttentionInputs(
            tokens.query, key, value, tokens.positions, common, params, tokens.padded, centroids=centroids
        )
        output = forward.attend(masked=bool(self.num_filled or tokens.padded))
        update_scores(forward, self._prompt_sample(), [ScoreAccumulator(self.eviction, scores)])
        self._retain(tokens.key, tokens.value, scores, positions)
        return output

    def _prompt_sample(self) -> Sample:
        sample = self.eviction.sample
        if sample.repeated and not self.num_filled:
            raise UserError(
                f"{self.eviction.name} scores a prompt while the model repeats it, which a plain forward does not do; "
                "start the cache with baklava.runtime.prefill.prefill(loaded, plan, ids)"
            )
        return Sample() if sample.repeated else sample

    @override
    def _load_prompt(
        self, key: KVStates, value: KVStates, score: Tensor | None, positions: Int[Tensor, "#batch tokens"]
    ) -> None:
        if score is None:
            raise ValueError(f"{self.eviction.name} needs the scores of the prompt, and none were recorded")
        self._retain(key, value, score, positions[:, None].expand(score.shape).int())

    def _retain(self, key: KVStates, value: KVStates, scores: Tensor, positions: Tensor) -> None:
        """Keep the best of what is held and of these new entries behind it, in the order that they have there."""
        retained = self._topk(scores, positions)
        if self.centroids is not None and retained.shape[2] < positions.shape[2]:
            keys, values = (
                torch.cat([own.read(self.num_filled), new], 2) if self.num_filled else new
                for own, new in ((self.keys, key), (self.values, value))
            )
            weights = self._weights(scores, positions).scatter(2, retained, 0.0)
            self.centroids = self.centroids.merge(keys, values, weights, PROMPT_KMEANS_ITERATIONS)
        scores, positions = scores.gather(2, retained), positions.gather(2, retained)
        self._replace(key, value, torch.where(positions < 0, EMPTY, retained))
        self.positions = _resized(positions, self.num_slots)
        self.scores = _resized(scores, self.num_slots)
        self.tokens_since_eviction = 0

    def _topk(self, scores: Tensor, positions: Tensor) -> Tensor:
        entries = positions.shape[2]
        kept = min(entries, self.num_retained)
        retained = self._rank(scores, positions).topk(kept, sorted=False).indices
        # Padding goes last, so that a padded row has its sinks in the same slots as all others.
        padding = positions.gather(2, retained) < 0
        return (retained + padding * entries).sort().values % entries

    def _evict(self) -> None:
        self.tokens_since_eviction = 0
        if self.num_filled <= self.num_retained:
            return
        rank = self._rank(self.scores[..., : self.num_filled], self.cached_positions())
        evicted = rank.topk(self.num_filled - self.num_retained, largest=False, sorted=False).indices.sort().values
        if self.centroids is not None:
            weights = self._weights(self.scores.gather(2, evicted), self.positions.gather(2, evicted))
            self.centroids.copy_(self.centroids.merge(self.keys.gather(evicted), self.values.gather(evicted), weights))
        source, target = _compaction_moves(evicted, self.num_retained)
        for storage in (self.keys, self.values):
            storage.move(source, target)
        for state in (self.positions, self.scores):
            state.scatter_(2, target, state.gather(2, source))
        self.num_filled = self.num_retained

    def _weights(self, scores: Tensor, positions: Tensor) -> Tensor:
        """What entries weigh among the members of a centroid: the attention that they had."""
        return mean_attention(scores, self.eviction).masked_fill(positions < 0, 0)

    def _accumulator(self) -> ScoreAccumulator:
        return ScoreAccumulator(self.eviction, self.scores[..., : self.num_filled])

    def _rank(self, scores: Tensor, positions: Tensor) -> Tensor:
        last = positions.amax(2, keepdim=True)
        newest = self.eviction.newest(self.budget.tokens)
        scores = _pooled(scores, positions, self.eviction.pooling)
        protected = (positions < self.eviction.sinks) | (positions > last - newest)
        return scores.masked_fill(protected, torch.inf).masked_fill(positions < 0, -torch.inf)

    @override
    def cached_positions(self) -> Int[Tensor, "batch heads entries"]:
        return self.positions[..., : self.num_filled]

    @override
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        self.shared = None
        self.keys.select_rows(rows)
        self.values.select_rows(rows)
        rows = rows.to(self.positions.device)
        self.positions, self.scores = self.positions[rows], self.scores[rows]
        self.centroids = None if self.centroids is None else self.centroids.select_rows(rows)

    def _grow(self, needed: int) -> None:
        super()._grow(needed)
        if self.positions.shape[2] < self.num_slots:
            self.positions = _resized(self.positions, self.num_slots)
            self.scores = _resized(self.scores, self.num_slots)

    def _state(self) -> tuple[Tensor, ...]:
        held = () if self.centroids is None else self.centroids.tensors
        return self.positions, self.scores, *held


def _compaction_moves(evicted: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Slots behind the first `keep` whose entries stay, and the slots of the losers before them that take these.

    Losers come in order, and fill all but `keep` slots. Rows differ in how many entries move; the rest of a row moves
    one onto itself.
    """
    places = torch.arange(evicted.shape[2], device=evicted.device)
    leaves = (places[:, None] + keep == evicted[:, :, None]).any(-1)
    source = leaves.int().argsort(dim=2, stable=True) + keep
    holes = (evicted < keep).sum(2, keepdim=True)
    return torch.where(places < holes, source, evicted), evicted


def _pooled(scores: Tensor, positions: Tensor, width: int) -> Tensor:
    """Mean over the `width` entries around each, in the order of their positions; padding counts as nothing."""
    if width == 1:
        return scores
    order = positions.argsort(dim=2)
    real = (positions >= 0).to(scores.dtype)
    sums, counts = (
        avg_pool1d(each.gather(2, order), width, stride=1, padding=width // 2)
        for each in (scores.masked_fill(positions < 0, 0), real)
    )
    return (sums / counts.clamp(min=1 / width)).gather(2, order.argsort(dim=2))


def _resized(state: Tensor, size: int) -> Tensor:
    resized = state.new_zeros(*state.shape[:2], size)
    kept = min(size, state.shape[2])
    resized[..., :kept] = state[..., :kept]
    return resized
