"""A slow, obviously correct budgeted cache: dense attention over everything, with an explicit set of kept positions."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from baklava.eviction import Eviction, Observation


@dataclass
class ReferenceHead:
    """One KV head of one row: all keys and values [tokens, dim] of a text, and the positions that may be seen."""

    capacity: int
    eviction: Eviction
    keys: Tensor
    values: Tensor
    seen: int = 0
    kept: list[int] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    since: int = 0

    def prompt(self, query: Tensor, scaling: float) -> Tensor:
        """`query` [group, tokens, dim]; everything is attended to causally, then cut to the budget."""
        output = self._attend(query, scaling)
        self.cut()
        self.since = 0
        return output

    def step(self, query: Tensor, scaling: float) -> Tensor:
        """One token; a ring drops its oldest entry before the token attends, a ranked head cuts after an interval."""
        if not self.eviction.scored and len(self.kept) == self.capacity:
            self.kept.remove(min(p for p in self.kept if p >= self.eviction.sinks))
        output = self._attend(query, scaling)
        self.since += 1
        if self.eviction.scored and self.since >= self.eviction.interval:
            self.cut()
            self.since = 0
        return output

    def _attend(self, query: Tensor, scaling: float) -> Tensor:
        new = list(range(self.seen, self.seen + query.shape[1]))
        self.seen += len(new)
        self.kept += new
        self.scores |= dict.fromkeys(new, 0.0)
        held = torch.tensor(self.kept)
        logits = query @ self.keys[held].T * scaling
        logits = logits.masked_fill(held[None, None, :] > torch.tensor(new)[None, :, None], -torch.inf)
        attention = logits.softmax(-1)
        if self.eviction.scored:
            previous = torch.tensor([self.scores[p] for p in self.kept])
            seen = Observation(
                attention[None, None], torch.tensor([new]), held[None, None], previous[None, None].to(attention.dtype)
            )
            self.scores = dict(zip(self.kept, self.eviction.score(seen)[0, 0].tolist(), strict=True))
        return attention @ self.values[held]

    def cut(self) -> None:
        """Keep sinks, the newest, and the best of the rest."""
        room = self.capacity - (self.eviction.interval if self.eviction.scored else 0)
        if len(self.kept) <= room:
            return
        newest = self.eviction.newest(self.capacity) if self.eviction.scored else room
        last = self.kept[-1]

        def rank(position: int) -> float:
            if position < self.eviction.sinks or (self.eviction.scored and position > last - newest):
                return float("inf")
            return self.scores[position] if self.eviction.scored else position

        self.kept = sorted(sorted(self.kept, key=rank, reverse=True)[:room])
