"""Centroids: a few entries per head that stand for all that it evicted, so that the mass of what left is not lost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava.cache.attention import CentroidEntries, KVStates
from baklava.eviction import Eviction

Means = Float[Tensor, "batch heads count head_dim"]
Weights = Float[Tensor, "batch heads tokens"]

PROMPT_KMEANS_ITERATIONS = 4
"""Rounds of k-means over the many entries that a prompt leaves behind; the few of decoding take one."""

KMEANS_BLOCK_BYTES = 1 << 20
"""Keys that are looked at at a time, in 32 bits; at least `MIN_KMEANS_BLOCK_ENTRIES` entries."""

MIN_KMEANS_BLOCK_ENTRIES = 512

MAX_FLOAT16 = torch.finfo(torch.float16).max

MIN_WEIGHT = 1e-12
"""What an entry weighs at the least: nothing, but with a logarithm."""


@dataclass(frozen=True, eq=False)
class Centroids:
    """Weighted means of evicted keys and values, in float16, and what their members weigh.

    bfloat16 would stop moving after some thousand members: a step towards a new one is lost in its rounding.

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
    def empty(cls, template: KVStates, heads: int, count: int) -> "Centroids":
        """Centroids without members, for entries like these."""
        shape, device = (template.shape[0], heads, count), template.device
        key, value = (torch.zeros(*shape, template.shape[3], dtype=torch.float16, device=device) for _ in range(2))
        weight, entropy = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2))
        return cls(key, value, weight, entropy)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held in memory."""
        return tuple(getattr(self, each.name) for each in fields(self))

    def entries(self, dtype: torch.dtype) -> CentroidEntries:
        """As entries that are attended to, in the dtype that the model computes in."""
        weight = self.weight.clamp(min=MIN_WEIGHT)
        bias = torch.where(self.weight > 0, weight.log() - self.entropy / weight, torch.finfo(torch.float32).min)
        return CentroidEntries(self.key.to(dtype), self.value.to(dtype), bias)

    def merge(self, key: KVStates, value: KVStates, weight: Weights, iterations: int = 1) -> "Centroids":
        """These entries folded in by k-means, which begins where it is; an entry of weight 0 takes no part."""
        centres = torch.where(self.weight[..., None] > 0, self.key.float(), _seeds(key, weight, self._count))
        for _ in range(iterations - 1):
            centres = self._moved(centres, key, value, weight)
        sums = [torch.zeros_like(centres), torch.zeros_like(centres), *map(torch.zeros_like, self.tensors[2:])]
        for keys, values, weights, entropies in self._blocks(key, value, weight):
            members = _nearest(keys.float(), centres)
            mass = members * weights[..., None]
            parts = _total(mass, keys), _total(mass, values), mass.sum(2), (members * entropies[..., None]).sum(2)
            for total, part in zip(sums, parts, strict=True):
                total += part
        means = (sum_ / sums[2][..., None].clamp(min=MIN_WEIGHT) for sum_ in sums[:2])
        return Centroids(*(mean.clamp(-MAX_FLOAT16, MAX_FLOAT16).half() for mean in means), *sums[2:])

    def _moved(self, centres: Means, key: KVStates, value: KVStates, weight: Weights) -> Means:
        """The means of the keys that are nearest to each centre, of the own members and of these entries."""
        total, mass = torch.zeros_like(centres), torch.zeros_like(self.weight)
        for keys, _, weights, _ in self._blocks(key, value, weight):
            share = _nearest(keys.float(), centres) * weights[..., None]
            total += _total(share, keys)
            mass += share.sum(2)
        return torch.where(mass[..., None] > 0, total / mass[..., None].clamp(min=MIN_WEIGHT), centres)

    def _blocks(self, key: KVStates, value: KVStates, weight: Weights) -> Iterator[tuple[Tensor, ...]]:
        """Keys, values, weights and entropies: of the own members, then of the entries, a block at a time.

        A copy in 32 bits of a whole prompt would be as large as a layer of the full cache.
        """
        yield self.tensors
        size = max(MIN_KMEANS_BLOCK_ENTRIES, KMEANS_BLOCK_BYTES // (4 * key[:, :, :1].numel()))
        for start in range(0, key.shape[2], size):
            part = slice(start, start + size)
            weights = weight[..., part].float()
            yield key[:, :, part], value[:, :, part], weights, weights * weights.clamp(min=MIN_WEIGHT).log()

    @classmethod
    def cat(cls, rows: "Sequence[Centroids]") -> "Centroids | None":
        """Copies of all of them, as rows of one batch; nothing of none."""
        columns = zip(*(each.tensors for each in rows), strict=True)
        return cls(*(torch.cat(column) for column in columns)) if rows else None

    def copy_(self, others: "Centroids") -> None:
        """Become like others, in place, for all who share this memory."""
        for mine, new in zip(self.tensors, others.tensors, strict=True):
            mine.copy_(new)

    def row(self, row: int) -> "Centroids":
        """One row, which shares memory with this."""
        return Centroids(*(each[row : row + 1] for each in self.tensors))

    def select_rows(self, rows: Int[Tensor, " rows"]) -> "Centroids":
        """These rows of the batch, in this order."""
        return Centroids(*(each.index_select(0, rows.to(each.device)) for each in self.tensors))

    @property
    def _count(self) -> int:
        return self.weight.shape[2]


def mean_attention(scores: Tensor, eviction: Eviction) -> Tensor:
    """The mean attention that scores stand for, up to a factor; all the same where they say nothing of it.

    What no query has counted for yet weighs next to nothing: as much as the mean of the others was no better (KL, 3.1 %
    of the bytes: .0342 / .0646 so, .0338 / .0657 with the mean; at 6.25 and 12.5 % the same).
    """
    power = eviction.attention_power
    return scores.clamp(min=MIN_WEIGHT) ** (1 / power) if power else torch.ones_like(scores)


def _seeds(key: KVStates, weight: Weights, count: int) -> Means:
    """Keys of entries that take part, evenly spread over the order in which they come."""
    rank = (weight > 0).cumsum(2).float()
    steps = (torch.arange(count, device=key.device) + 0.5) / count
    wanted = (rank[..., -1:] * steps).floor() + 1
    index = torch.searchsorted(rank, wanted).clamp(max=key.shape[2] - 1)
    return key.gather(2, index[..., None].expand(*index.shape, key.shape[3])).float()


def _total(mass: Float[Tensor, "batch heads tokens count"], entries: KVStates) -> Means:
    """Sums of entries by what of their mass goes to each centre."""
    return mass.transpose(2, 3) @ entries.float()


def _nearest(keys: KVStates, centres: Means) -> Float[Tensor, "batch heads tokens count"]:
    """One-hot: the centre that each key is nearest to."""
    closeness = keys @ centres.transpose(2, 3) - centres.square().sum(-1)[:, :, None] / 2
    return torch.nn.functional.one_hot(closeness.argmax(-1), centres.shape[2]).float()
