"""Centroids: a few entries per head that stand for all that it evicted, so that the mass of what left is not lost."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava.attention import Heads, Summary
from baklava.eviction import Eviction
from baklava.storage import stored_dtype

Means = Float[Tensor, "batch heads count head_dim"]
Weights = Float[Tensor, "batch heads tokens"]

ITERATIONS = 4
"""Rounds of k-means over the many entries that a prompt leaves behind; the few of decoding take one."""

LEAST = 1e-12
"""What an entry weighs at the least: nothing, but with a logarithm."""


@dataclass(frozen=True, eq=False)
class Centroids:
    """Weighted means of evicted keys and values, in 16 bits, and what their members weigh.

    A member i weighs m_i, about the mean attention that it had. A query q gives the members of one centroid about
    sum_i exp(q·k_i); at the mean key k = sum m_i k_i / sum m_i, exp(q·k) is the weighted geometric mean of their
    exponentials, so the centroid stands for W exp(q·k) / exp(sum m_i log m_i / W) with W = sum m_i: its `bias` is
    log W - sum m_i log m_i / W, the logarithm of the number of members where they weigh the same. It does not change
    when all weights are scaled. (KeepKV, arXiv 2504.09936, keeps counts of merged entries for the same reason.)
    """

    key: Means
    value: Means
    weight: Float[Tensor, "batch heads count"]
    entropy: Float[Tensor, "batch heads count"]

    @classmethod
    def none_yet(cls, like: Heads, heads: int, count: int) -> "Centroids":
        """Centroids without members, for entries like these."""
        half = stored_dtype(like.dtype, 16)
        shape = (like.shape[0], heads, count)
        key, value = (torch.zeros(*shape, like.shape[3], dtype=half, device=like.device) for _ in range(2))
        weight, entropy = (torch.zeros(shape, dtype=torch.float32, device=like.device) for _ in range(2))
        return cls(key, value, weight, entropy)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held in memory."""
        return tuple(getattr(self, each.name) for each in fields(self))

    def summary(self, dtype: torch.dtype) -> Summary:
        """As entries that are attended to, in the dtype that the model computes in."""
        weight = self.weight.clamp(min=LEAST)
        bias = torch.where(self.weight > 0, weight.log() - self.entropy / weight, torch.finfo(torch.float32).min)
        return Summary(self.key.to(dtype), self.value.to(dtype), bias)

    def with_members(self, key: Heads, value: Heads, weight: Weights, iterations: int = 1) -> "Centroids":
        """These entries folded in by k-means, which begins where it is; an entry of weight 0 takes no part."""
        weight = weight.float()
        keys, values = (torch.cat([own.float(), new.float()], 2) for own, new in ((self.key, key), (self.value, value)))
        weights = torch.cat([self.weight, weight], 2)
        entropies = torch.cat([self.entropy, weight * weight.clamp(min=LEAST).log()], 2)
        centres = torch.where(self.weight[..., None] > 0, self.key.float(), _seeds(key.float(), weight, self._count))
        for _ in range(iterations):
            members = _nearest(keys, centres) * weights[..., None]
            total = members.sum(2)
            centres = torch.where(total[..., None] > 0, _mean(members, keys, total), centres)
        joined = (members > 0).float()
        return Centroids(
            torch.where(total[..., None] > 0, centres, 0).to(self.key.dtype),
            _mean(members, values, total).to(self.value.dtype),
            total,
            (joined.transpose(2, 3) @ entropies[..., None])[..., 0],
        )

    def of_rows(self, rows: Int[Tensor, " rows"]) -> "Centroids":
        """These rows of the batch, in this order."""
        return Centroids(*(each.index_select(0, rows.to(each.device)) for each in self.tensors))

    @property
    def _count(self) -> int:
        return self.weight.shape[2]


def attention_of(scores: Tensor, eviction: Eviction) -> Tensor:
    """The mean attention that scores stand for, up to a factor; all the same where they say nothing of it."""
    power = eviction.attention_power
    return scores.clamp(min=LEAST) ** (1 / power) if power else torch.ones_like(scores)


def _seeds(key: Heads, weight: Weights, count: int) -> Means:
    """Keys of entries that take part, evenly spread over the order in which they come."""
    rank = (weight > 0).cumsum(2).float()
    steps = (torch.arange(count, device=key.device) + 0.5) / count
    wanted = (rank[..., -1:] * steps).floor() + 1
    index = torch.searchsorted(rank, wanted).clamp(max=key.shape[2] - 1)
    return key.gather(2, index[..., None].expand(*index.shape, key.shape[3]))


def _nearest(keys: Heads, centres: Means) -> Float[Tensor, "batch heads tokens count"]:
    """One-hot: the centre that each key is nearest to."""
    closeness = keys @ centres.transpose(2, 3) - centres.square().sum(-1)[:, :, None] / 2
    return torch.nn.functional.one_hot(closeness.argmax(-1), centres.shape[2]).float()


def _mean(members: Tensor, entries: Heads, total: Tensor) -> Means:
    return members.transpose(2, 3) @ entries / total[..., None].clamp(min=LEAST)
