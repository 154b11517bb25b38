"""Centroids: a few entries per head that stand for all evicted ones, so that their attention mass is not lost."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from baklava.cache.attention import CentroidEntries, KVStates
from baklava.cache.storage import Slab, TensorSpec
from baklava.eviction import Eviction

Means = Float[Tensor, "batch heads count head_dim"]
Weights = Float[Tensor, "batch heads tokens"]

PROMPT_KMEANS_ITERATIONS = 4
"""Iterations of k-means over the entries that are evicted from a prompt; the few of a decode step take one."""

KMEANS_BLOCK_BYTES = 1 << 20
"""Size in 32 bits of the keys that k-means processes at a time; at least `MIN_KMEANS_BLOCK_ENTRIES` entries."""

MIN_KMEANS_BLOCK_ENTRIES = 512

MAX_FLOAT16 = torch.finfo(torch.float16).max

MIN_WEIGHT = 1e-12
"""Minimum weight; keeps log(weight) finite."""


@dataclass(frozen=True, eq=False)
class Centroids:
    """Weighted means of evicted keys and values, in float16, and the weights of their members.

    bfloat16 would stop moving after some thousand members: its rounding loses the step towards a new one.

    A member i weighs m_i, about the mean attention that it had. A query q gives the members of one centroid about
    sum_i exp(q·k_i); at the mean key k = sum m_i k_i / sum m_i, exp(q·k) is the weighted geometric mean of their
    exponentials, so the centroid stands for W exp(q·k) / exp(sum m_i log m_i / W) with W = sum m_i: its `bias` is
    log W - sum m_i log m_i / W, the logarithm of the number of members if they weigh the same. It does not change
    if all weights are scaled. (KeepKV, arXiv 2504.09936, keeps counts of merged entries for the same reason.)
    """

    key: Means
    value: Means
    weight: Float[Tensor, "batch heads count"]
    entropy: Float[Tensor, "batch heads count"]

    @staticmethod
    def specs(heads: int, count: int, head_dim: int) -> list[TensorSpec]:
        """Return the tensors of `count` centroids per head, in the order of the fields."""
        means, numbers = TensorSpec((heads, count, head_dim), torch.float16), TensorSpec((heads, count), torch.float32)
        return [means, means, numbers, numbers]

    @classmethod
    def bind(cls, tensors: Iterator[Tensor]) -> "Centroids":
        """Return the centroids in the tensors of the specs."""
        return cls(*(next(tensors) for _ in fields(cls)))

    @classmethod
    def empty(cls, template: KVStates, heads: int, count: int) -> "Centroids":
        """Return centroids without members in memory of their own, for entries like the template."""
        slab = Slab(cls.specs(heads, count, template.shape[3]), template.shape[0], template.device)
        return cls.bind(iter(slab.tensors))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def entries(self, dtype: torch.dtype) -> CentroidEntries:
        """Return the centroids as entries to attend to, in the dtype that the model computes in."""
        weight = self.weight.clamp(min=MIN_WEIGHT)
        bias = torch.where(self.weight > 0, weight.log() - self.entropy / weight, torch.finfo(torch.float32).min)
        return CentroidEntries(self.key.to(dtype), self.value.to(dtype), bias)

    def merge(self, key: KVStates, value: KVStates, weight: Weights, iterations: int = 1) -> "Centroids":
        """Return the centroids with these entries merged in by k-means; an entry of weight 0 takes no part."""
        centres = torch.where(self.weight[..., None] > 0, self.key.float(), _seeds(key, weight, self.weight.shape[2]))
        for _ in range(iterations - 1):
            centres = self._update_centres(centres, key, value, weight)
        sums = [torch.zeros_like(centres), torch.zeros_like(centres), *map(torch.zeros_like, self.tensors[2:])]
        for keys, values, weights, entropies in self._blocks(key, value, weight):
            members = _nearest(keys.float(), centres)
            mass = members * weights[..., None]
            parts = (
                _weighted_sum(mass, keys),
                _weighted_sum(mass, values),
                mass.sum(2),
                (members * entropies[..., None]).sum(2),
            )
            for total, part in zip(sums, parts, strict=True):
                total += part
        means = (sum_ / sums[2][..., None].clamp(min=MIN_WEIGHT) for sum_ in sums[:2])
        return Centroids(*(mean.clamp(-MAX_FLOAT16, MAX_FLOAT16).half() for mean in means), *sums[2:])

    def _update_centres(self, centres: Means, key: KVStates, value: KVStates, weight: Weights) -> Means:
        """Return the means of the members and new keys that are nearest to each centre."""
        total, mass = torch.zeros_like(centres), torch.zeros_like(self.weight)
        for keys, _, weights, _ in self._blocks(key, value, weight):
            share = _nearest(keys.float(), centres) * weights[..., None]
            total += _weighted_sum(share, keys)
            mass += share.sum(2)
        return torch.where(mass[..., None] > 0, total / mass[..., None].clamp(min=MIN_WEIGHT), centres)

    def _blocks(self, key: KVStates, value: KVStates, weight: Weights) -> Iterator[tuple[Tensor, ...]]:
        """Yield keys, values, weights and entropies: of the members, then of the new entries block by block.

        A copy of a whole prompt in 32 bits would be as large as a layer of the full cache.
        """
        yield self.tensors
        size = max(MIN_KMEANS_BLOCK_ENTRIES, KMEANS_BLOCK_BYTES // (4 * key[:, :, :1].numel()))
        for start in range(0, key.shape[2], size):
            block = slice(start, start + size)
            weights = weight[..., block].float()
            yield key[:, :, block], value[:, :, block], weights, weights * weights.clamp(min=MIN_WEIGHT).log()

    def copy_(self, others: "Centroids") -> None:
        """Copy other centroids into these, in place."""
        for own, new in zip(self.tensors, others.tensors, strict=True):
            own.copy_(new)


def mean_attention(scores: Tensor, eviction: Eviction) -> Tensor:
    """Return the mean attention that scores stand for, up to a factor; 1 if the method's scores are something else.

    Entries that no query has observed yet weigh next to nothing. The mean weight of the others instead was no better
    (KL at 3.1 % of the bytes: .0342 / .0646 against .0338 / .0657 with the mean; the same at 6.25 and 12.5 %).
    """
    power = eviction.attention_power
    return scores.clamp(min=MIN_WEIGHT) ** (1 / power) if power else torch.ones_like(scores)


def _seeds(key: KVStates, weight: Weights, count: int) -> Means:
    """Return `count` keys of entries with a weight, evenly spread over their order."""
    rank = (weight > 0).cumsum(2).float()
    steps = (torch.arange(count, device=key.device) + 0.5) / count
    targets = (rank[..., -1:] * steps).floor() + 1
    index = torch.searchsorted(rank, targets).clamp(max=key.shape[2] - 1)
    return key.gather(2, index[..., None].expand(*index.shape, key.shape[3])).float()


def _weighted_sum(mass: Float[Tensor, "batch heads tokens count"], entries: KVStates) -> Means:
    """Return the sum of entries for each centre, weighted by the mass that they give it."""
    return mass.transpose(2, 3) @ entries.float()


def _nearest(keys: KVStates, centres: Means) -> Float[Tensor, "batch heads tokens count"]:
    """Return the nearest centre of each key, one-hot."""
    closeness = keys @ centres.transpose(2, 3) - centres.square().sum(-1)[:, :, None] / 2
    return torch.nn.functional.one_hot(closeness.argmax(-1), centres.shape[2]).float()
