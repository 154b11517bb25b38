"""A slow, obviously correct budgeted cache: dense attention over everything, with an explicit list of positions."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from baklava.eviction import Eviction, Observation, QuerySample


@dataclass
class ReferenceHead:
    """One KV head of one row: all keys and values [tokens, dim] of a text, and the positions that are cached."""

    capacity: int
    eviction: Eviction
    keys: Tensor
    values: Tensor
    num_seen: int = 0
    cached: list[int] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    tokens_since_eviction: int = 0

    def prompt(self, query: Tensor, scaling: float) -> Tensor:
        """`query` [group, tokens, dim]; attends to everything causally, then compresses to the budget."""
        output = self._attend(query, scaling)
        self._compress()
        self.tokens_since_eviction = 0
        return output

    def step(self, query: Tensor, scaling: float) -> Tensor:
        """One token: a ring evicts its oldest entry before it attends, a scored head evicts after an interval."""
        if not self.eviction.scored and len(self.cached) == self.capacity:
            self.cached.remove(min(p for p in self.cached if p >= self.eviction.sinks))
        output = self._attend(query, scaling)
        self.tokens_since_eviction += 1
        if self.eviction.scored and self.tokens_since_eviction >= self.eviction.eviction_interval:
            self._compress()
            self.tokens_since_eviction = 0
        return output

    def _attend(self, query: Tensor, scaling: float) -> Tensor:
        new = list(range(self.num_seen, self.num_seen + query.shape[1]))
        is_prompt = self.num_seen == 0
        self.num_seen += len(new)
        self.cached += new
        self.scores |= dict.fromkeys(new, 0.0)
        cached = torch.tensor(self.cached)
        logits = query @ self.keys[cached].T * scaling
        logits = logits.masked_fill(cached[None, None, :] > torch.tensor(new)[None, :, None], -torch.inf)
        attention = logits.softmax(-1)
        if self.eviction.scored:
            self._update_scores(query, attention, torch.tensor(new), cached, scaling, is_prompt)
        return attention @ self.values[cached]

    def _update_scores(
        self, query: Tensor, attention: Tensor, new: Tensor, cached: Tensor, scaling: float, is_prompt: bool
    ) -> None:
        sample = self.eviction.query_sample if is_prompt else QuerySample()
        method = self.eviction.decoding if sample.references else self.eviction
        rows = [
            row
            for row in range(len(new))
            if (len(new) - 1 - row) % sample.stride == 0
            and (sample.window is None or row >= len(new) - max(1, sample.window))
        ]
        previous = torch.tensor([self.scores[p] for p in self.cached])
        observation = Observation(
            query=query[None, None, :, rows],
            key=self.keys[cached][None, None],
            value=self.values[cached][None, None],
            query_positions=new[None, rows],
            key_positions=cached[None, None],
            previous_scores=previous[None, None].to(attention.dtype),
            scaling=scaling,
            compute_attention=lambda: attention[None, None, :, rows],
            stride=sample.stride,
            decoding=not is_prompt,
        )
        scores = method.score(observation)[0, 0]
        if sample.references:
            scores = (scores * self._match(query, scaling, min(sample.references, len(new)))).sqrt()
        self.scores = dict(zip(self.cached, scores.tolist(), strict=True))

    def _match(self, query: Tensor, scaling: float, count: int) -> Tensor:
        """Return how much entries of a prompt of one block matter to references, which see their own block twice."""
        tokens = query.shape[1]
        errors, squares = torch.zeros(2, count, query.shape[0], tokens)
        for place in range(count):
            token = place * tokens // count
            keys, values = (torch.cat([of[:tokens], of[: token + 1]]) for of in (self.keys, self.values))
            attention = (query[:, token] @ keys.T * scaling).softmax(-1)
            output = attention @ values
            squares[place] = attention[:, :tokens].square()
            errors[place] = squares[place] * (self.values[:tokens] - output[:, None]).square().sum(-1)
        errors = errors.amax(1).sum(0)
        return errors * squares.amax(1).sum() / errors.sum().clamp(min=1e-30) / count

    def _compress(self) -> None:
        """Retain sinks, the recent window, and the best of the rest."""
        size = self.capacity - (self.eviction.eviction_interval if self.eviction.scored else 0)
        if len(self.cached) <= size:
            return
        recent_window = self.eviction.recent_window(self.capacity) if self.eviction.scored else size
        last = self.cached[-1]
        reach = self.eviction.pooling // 2
        around = {p: self.cached[max(0, i - reach) : i + reach + 1] for i, p in enumerate(self.cached)}

        def rank(position: int) -> float:
            if position < self.eviction.sinks or (self.eviction.scored and position > last - recent_window):
                return float("inf")
            if not self.eviction.scored:
                return position
            return sum(self.scores[p] for p in around[position]) / len(around[position])

        self.cached = sorted(sorted(self.cached, key=rank, reverse=True)[:size])
