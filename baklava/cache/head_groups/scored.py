"""Entries that compete by score."""

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import avg_pool1d
from typing_extensions import override

from baklava.cache.attention import Grouped, Heads, Kernel, Summary
from baklava.cache.head_groups.base import Budget, HeadGroup, Tokens
from baklava.cache.head_groups.centroids import ITERATIONS, Centroids, attention_of
from baklava.cache.head_groups.score_updates import Forward, Scorekeeper, observe
from baklava.cache.storage import NOTHING
from baklava.errors import UserError
from baklava.eviction import Eviction, Sample


class Ranked(HeadGroup):
    """Entries that compete by score. New tokens fill the slack behind the kept ones; when it is full, the losers go.

    Slots [0, filled) are in use in every row and head. An eviction moves the winners of the slack into the slots of
    the losers, so it copies at most `interval` entries.
    """

    def __init__(self, budget: Budget, eviction: Eviction, like: Heads, room: int | None = None) -> None:
        super().__init__(budget, eviction, like, room)
        shape = (like.shape[0], len(budget.heads), 0)
        self.positions = torch.empty(shape, dtype=torch.int32, device=like.device)
        self.scores = torch.empty(shape, dtype=torch.float32, device=like.device)
        self.since = 0
        self.keep = budget.tokens - eviction.interval
        self.centroids = Centroids.none_yet(like, len(budget.heads), eviction.centroids) if eviction.centroids else None

    @override
    def _attend(self, tokens: Tokens, kernel: Kernel) -> Grouped:
        if not tokens.forced and (not self.filled or tokens.count > self.eviction.interval):
            return self._block(tokens, kernel)
        if tokens.count == 1:
            return self._step(tokens, kernel)
        outputs, start = [], 0
        while start < tokens.count:
            stop = min(start + self.eviction.interval - self.since, tokens.count)
            outputs.append(self._step(tokens.part(start, stop), kernel))
            start = stop
        return torch.cat(outputs, 3)

    def _step(self, tokens: Tokens, kernel: Kernel) -> Grouped:
        """Tokens up to the next eviction at most; the slack has room for them."""
        self._append(tokens)
        forward = self._forward(tokens, kernel)
        masked = tokens.count > 1 or tokens.padded
        if self.eviction.sample.window == 0:
            output = forward.attend(masked)
        else:
            output, attention = forward.attend_and_show(masked)
            self._keeper().take(forward.observation(slice(0, None), self.filled, attention))
        due = self.since + tokens.count >= self.eviction.interval and self.filled > self.keep
        if due and self.eviction.sample.window == 0:
            observe(forward, self.eviction.sample, [self._keeper()])
        self.age(tokens.count)
        return output

    def make_room(self) -> None:
        """A slot for a token of a sequence without padding, which is about to be written and scored."""
        self._grow(self.filled + 1)
        self.filled += 1

    def age(self, tokens: int = 1) -> None:
        """So many tokens have been taken in, attended to and scored: evict, if it is time."""
        self.since += tokens
        if self.since >= self.eviction.interval:
            self._evict()

    def _append(self, tokens: Tokens) -> None:
        start, self.filled = self.filled, self.filled + tokens.count
        self._grow(self.filled)
        self.scores[:, :, start : self.filled] = 0
        if tokens.padded:
            self._scatter(tokens, start)
            return
        self.keys.write(start, tokens.key)
        self.values.write(start, tokens.value)
        self.positions[:, :, start : self.filled] = tokens.positions[:, None]

    def _scatter(self, tokens: Tokens, start: int) -> None:
        """Append to rows of which some may lack sinks still: those go where other rows have theirs, which is empty."""
        behind = torch.arange(start, self.filled, device=tokens.key.device)
        early = (tokens.positions >= 0) & (tokens.positions < min(self.eviction.sinks, start))
        slots = torch.where(early, tokens.positions, behind)[:, None].expand(tokens.key.shape[:3])
        self.keys.scatter(slots, tokens.key)
        self.values.scatter(slots, tokens.value)
        self.positions[:, :, start : self.filled] = NOTHING
        self.positions.scatter_(2, slots, tokens.positions[:, None].expand_as(slots).int())
        self.scores.scatter_(2, slots, 0.0)

    def _forward(self, tokens: Tokens, kernel: Kernel) -> Forward:
        key, value = self.keys.read(self.filled), self.values.read(self.filled)
        held = (key, value, tokens.positions, self.kept(), kernel, tokens.padded)
        return Forward(tokens.query, *held, decoding=True, summary=self._summary(tokens))

    def _summary(self, tokens: Tokens) -> Summary | None:
        return None if self.centroids is None else self.centroids.summary(tokens.query.dtype)

    def _block(self, tokens: Tokens, kernel: Kernel) -> Grouped:
        """Many tokens: they attend to everything held and to each other, then all compete."""
        shape = (*tokens.key.shape[:2], tokens.count)
        key = torch.cat([self.keys.read(self.filled), tokens.key], 2)
        value = torch.cat([self.values.read(self.filled), tokens.value], 2)
        positions = torch.cat([self.kept(), tokens.positions[:, None].expand(shape).int()], 2)
        scores = torch.cat([self.scores[..., : self.filled], self.scores.new_zeros(shape)], 2)
        # The entries of a first prompt are the same for all heads, and so is what is seen of them.
        common = positions if self.filled else tokens.positions[:, None]
        summary = self._summary(tokens) if self.filled else None
        forward = Forward(tokens.query, key, value, tokens.positions, common, kernel, tokens.padded, summary=summary)
        output = forward.attend(masked=bool(self.filled or tokens.padded))
        observe(forward, self._prompt_sample(), [Scorekeeper(self.eviction, scores)])
        self._keep(tokens.key, tokens.value, scores, positions)
        return output

    def _prompt_sample(self) -> Sample:
        sample = self.eviction.sample
        if sample.repeated and not self.filled:
            raise UserError(
                f"{self.eviction.name} scores a prompt while the model repeats it, which a plain forward does not do; "
                "start the cache with baklava.runtime.prefill.prefill(loaded, plan, ids)"
            )
        return Sample() if sample.repeated else sample

    @override
    def _fill(self, key: Heads, value: Heads, score: Tensor | None, positions: Int[Tensor, "#batch tokens"]) -> None:
        if score is None:
            raise ValueError(f"{self.eviction.name} needs the scores of the prompt, and none were recorded")
        self._keep(key, value, score, positions[:, None].expand(score.shape).int())

    def _keep(self, key: Heads, value: Heads, scores: Tensor, positions: Tensor) -> None:
        """Keep the best of what is held and of these new entries behind it, in the order that they have there."""
        winners = self._winners(scores, positions)
        if self.centroids is not None and winners.shape[2] < positions.shape[2]:
            keys, values = (
                torch.cat([own.read(self.filled), new], 2) if self.filled else new
                for own, new in ((self.keys, key), (self.values, value))
            )
            weights = self._weights(scores, positions).scatter(2, winners, 0.0)
            self.centroids = self.centroids.with_members(keys, values, weights, ITERATIONS)
        scores, positions = scores.gather(2, winners), positions.gather(2, winners)
        self._replace(key, value, torch.where(positions < 0, NOTHING, winners))
        self.positions = _resized(positions, self.size)
        self.scores = _resized(scores, self.size)
        self.since = 0

    def _winners(self, scores: Tensor, positions: Tensor) -> Tensor:
        entries = positions.shape[2]
        kept = min(entries, self.keep)
        winners = self._rank(scores, positions).topk(kept, sorted=False).indices
        # Padding goes last, so that a padded row has its sinks in the same slots as all others.
        padding = positions.gather(2, winners) < 0
        return (winners + padding * entries).sort().values % entries

    def _evict(self) -> None:
        self.since = 0
        if self.filled <= self.keep:
            return
        rank = self._rank(self.scores[..., : self.filled], self.kept())
        losers = rank.topk(self.filled - self.keep, largest=False, sorted=False).indices.sort().values
        if self.centroids is not None:
            weights = self._weights(self.scores.gather(2, losers), self.positions.gather(2, losers))
            self.centroids.hold(self.centroids.with_members(self.keys.at(losers), self.values.at(losers), weights))
        source, target = _moves(losers, self.keep)
        for storage in (self.keys, self.values):
            storage.move(source, target)
        for state in (self.positions, self.scores):
            state.scatter_(2, target, state.gather(2, source))
        self.filled = self.keep

    def _weights(self, scores: Tensor, positions: Tensor) -> Tensor:
        """What entries weigh among the members of a centroid: the attention that they had."""
        return attention_of(scores, self.eviction).masked_fill(positions < 0, 0)

    def _keeper(self) -> Scorekeeper:
        return Scorekeeper(self.eviction, self.scores[..., : self.filled])

    def _rank(self, scores: Tensor, positions: Tensor) -> Tensor:
        last = positions.amax(2, keepdim=True)
        newest = self.eviction.newest(self.budget.tokens)
        scores = _pooled(scores, positions, self.eviction.pooling)
        protected = (positions < self.eviction.sinks) | (positions > last - newest)
        return scores.masked_fill(protected, torch.inf).masked_fill(positions < 0, -torch.inf)

    @override
    def kept(self) -> Int[Tensor, "batch heads entries"]:
        return self.positions[..., : self.filled]

    @override
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        self.shared = None
        self.keys.select_rows(rows)
        self.values.select_rows(rows)
        rows = rows.to(self.positions.device)
        self.positions, self.scores = self.positions[rows], self.scores[rows]
        self.centroids = None if self.centroids is None else self.centroids.of_rows(rows)

    def _grow(self, needed: int) -> None:
        super()._grow(needed)
        if self.positions.shape[2] < self.size:
            self.positions = _resized(self.positions, self.size)
            self.scores = _resized(self.scores, self.size)

    def _state(self) -> tuple[Tensor, ...]:
        held = () if self.centroids is None else self.centroids.tensors
        return self.positions, self.scores, *held


def _moves(losers: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Slots behind the first `keep` whose entries stay, and the slots of the losers before them that take these.

    Losers come in order, and fill all but `keep` slots. Rows differ in how many entries move; the rest of a row moves
    one onto itself.
    """
    places = torch.arange(losers.shape[2], device=losers.device)
    leaves = (places[:, None] + keep == losers[:, :, None]).any(-1)
    source = leaves.int().argsort(dim=2, stable=True) + keep
    holes = (losers < keep).sum(2, keepdim=True)
    return torch.where(places < holes, source, losers), losers


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
