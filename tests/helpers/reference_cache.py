"""A slow, obviously correct budgeted cache: dense attention over everything, with an explicit set of kept positions."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from baklava.eviction import Eviction, Observation, Sample


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
        prompt = self.seen == 0
        self.seen += len(new)
        self.kept += new
        self.scores |= dict.fromkeys(new, 0.0)
        held = torch.tensor(self.kept)
        logits = query @ self.keys[held].T * scaling
        logits = logits.masked_fill(held[None, None, :] > torch.tensor(new)[None, :, None], -torch.inf)
        attention = logits.softmax(-1)
        if self.eviction.scored:
            self._observe(query, attention, torch.tensor(new), held, scaling, prompt)
        return attention @ self.values[held]

    def _observe(
        self, query: Tensor, attention: Tensor, new: Tensor, held: Tensor, scaling: float, prompt: bool
    ) -> None:
        sample = self.eviction.sample if prompt else Sample()
        rows = [
            row
            for row in range(len(new))
            if (len(new) - 1 - row) % sample.stride == 0
            and (sample.window is None or row >= len(new) - max(1, sample.window))
        ]
        previous = torch.tensor([self.scores[p] for p in self.kept])
        seen = Observation(
            query=query[None, None, :, rows],
            key=self.keys[held][None, None],
            value=self.values[held][None, None],
            query_positions=new[None, rows],
            key_positions=held[None, None],
            previous=previous[None, None].to(attention.dtype),
            scaling=scaling,
            attend=lambda: attention[None, None, :, rows],
            stride=sample.stride,
            decoding=not prompt,
        )
        self.scores = dict(zip(self.kept, self.eviction.score(seen)[0, 0].tolist(), strict=True))

    def cut(self) -> None:
        """Keep sinks, the newest, and the best of the rest."""
        room = self.capacity - (self.eviction.interval if self.eviction.scored else 0)
        if len(self.kept) <= room:
            return
        newest = self.eviction.newest(self.capacity) if self.eviction.scored else room
        last = self.kept[-1]
        reach = self.eviction.pooling // 2
        around = {p: self.kept[max(0, i - reach) : i + reach + 1] for i, p in enumerate(self.kept)}

        def rank(position: int) -> float:
            if position < self.eviction.sinks or (self.eviction.scored and position > last - newest):
                return float("inf")
            if not self.eviction.scored:
                return position
            return sum(self.scores[p] for p in around[position]) / len(around[position])

        self.kept = sorted(sorted(self.kept, key=rank, reverse=True)[:room])
