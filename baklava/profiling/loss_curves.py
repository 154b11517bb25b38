"""Loss curves: what a head alone costs when it keeps fewer entries in fewer bits, from one pass per window.

The loss of a head is predicted to second order. With g the gradient of the log-likelihood of tokens that the model
itself draws, with respect to the head's output, and d the error that a smaller cache makes in that output,
E[(g·d)²] / 2 is the KL between the full and the smaller model (the Fisher information is its curvature). Summed over
tokens, with errors at different tokens taken as independent, it is in nats, so the losses of heads can be compared and
added. The gradient needs a backward pass through the continuation alone; the context stays a constant.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from baklava.cache.attention import CentroidEntries
from baklava.cache.head_groups.centroids import PROMPT_KMEANS_ITERATIONS, Centroids, mean_attention
from baklava.cache.storage.fake_quantize import fake_quantize
from baklava.eviction import Eviction
from baklava.plan.byte_accounting import FULL_BITS
from baklava.profiling.output_gradients import LayerPass, Weights

QUERY_STRIDE = 4
"""Of the continuation every fourth query is measured: neighbours agree."""

Grid = Float[Tensor, "heads bits entries"]
Pair = tuple[int, int]


@dataclass(frozen=True)
class Lattice:
    """The capacities and the (key, value) bits that curves are measured at, and what evicts.

    Errors of keys and of values are independent, so each is measured beside exact ones of the other, and the loss of a
    pair follows: what eviction loses, and what each of the two adds to it.
    """

    eviction: Eviction
    entries: tuple[int, ...]
    bits: tuple[Pair, ...]

    @property
    def key_bits(self) -> tuple[int, ...]:
        """Bits of keys in any pair, the exact ones first."""
        return tuple(sorted({FULL_BITS, *(keys for keys, _ in self.bits)}, reverse=True))

    @property
    def value_bits(self) -> tuple[int, ...]:
        """Bits of values in any pair, the exact ones first."""
        return tuple(sorted({FULL_BITS, *(values for _, values in self.bits)}, reverse=True))

    def paired(
        self, keys: Float[Tensor, "heads key_bits entries"], values: Float[Tensor, "heads value_bits entries"]
    ) -> Float[Tensor, "heads pairs entries"]:
        """Losses of the pairs, from those of keys and of values in fewer bits alone."""
        exact = keys[:, :1]
        rows = [
            keys[:, self.key_bits.index(k)] + values[:, self.value_bits.index(v)] - exact[:, 0] for k, v in self.bits
        ]
        return torch.stack(rows, 1).clamp(min=0)


def losses(layer: LayerPass, scores: Float[Tensor, "heads context"], lattice: Lattice) -> tuple[Grid, Grid]:
    """Expected KL in nats per token, and relative error, of every head of a layer on the lattice.

    The relative error is the root of its mean square over the queries. `scores` are those of the context; the
    continuation competes for the same capacity.
    """
    sinks, order = lattice.eviction.sinks, channel_sizes(layer, lattice.eviction.sinks).argsort(descending=True)
    keys = [fake_quantize(layer.key, bits, sinks, centred=True, order=order) for bits in lattice.key_bits]
    values = [fake_quantize(layer.value, bits, sinks, centred=False) for bits in lattice.value_bits]
    found = [_head_losses(layer, head, scores[head], lattice, keys, values) for head in range(len(scores))]
    by_keys, by_values = (torch.stack(side) for side in zip(*found, strict=True))
    kl, squared = (lattice.paired(by_keys[..., i], by_values[..., i]) for i in (0, 1))
    return kl, squared.sqrt()


def channel_sizes(layer: LayerPass, sinks: int) -> Float[Tensor, "heads head_dim"]:
    """What each channel adds to the logits of a head: root mean squares of keys around their mean times of queries."""
    key = layer.key[:, sinks:].float()
    spread = (key - key.mean(1, keepdim=True)).square().mean(1).sqrt()
    return spread * layer.query.float().square().mean((1, 2)).sqrt()


def _head_losses(
    layer: LayerPass,
    head: int,
    scores: Float[Tensor, " context"],
    lattice: Lattice,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> tuple[Float[Tensor, "key_bits entries 2"], Float[Tensor, "value_bits entries 2"]]:
    """KL and squared relative error per bits of the keys, and per bits of the values, at every capacity."""
    kept = Kept(scores, layer.positions(QUERY_STRIDE), lattice.eviction)
    cut = [kept.cut(capacity, layer.key[head], layer.value[head]) for capacity in lattice.entries]
    weights = [layer.weights(head, key[head], QUERY_STRIDE) for key in keys]
    exact = weights[0].of_entries @ layer.value[head] / weights[0].of_entries.sum(-1, keepdim=True)
    gradient = layer.gradient[:, head, :, ::QUERY_STRIDE]
    by_keys = [[loss(output(layer, head, w, layer.value[head], c), exact, gradient) for c in cut] for w in weights]
    together = torch.cat([value[head] for value in values], 1)
    outputs = [output(layer, head, weights[0], together, c).chunk(len(values), -1) for c in cut]
    by_values = [[loss(each[i], exact, gradient) for each in outputs] for i in range(len(values))]
    return torch.tensor(by_keys), torch.tensor(by_values)


@dataclass(frozen=True)
class Cut:
    """Which entries a head holds for each measured query, and what stands for the others, if anything does."""

    mask: Bool[Tensor, "queries entries"]
    summary: CentroidEntries | None


@dataclass(frozen=True)
class Kept:
    """What a head holds for each measured query: sinks, the newest, and the best of the rest.

    `scores` are those of the context; what the continuation itself leaves behind comes last.
    """

    scores: Float[Tensor, " context"]
    queries: Int[Tensor, " queries"]
    eviction: Eviction

    def cut(
        self, capacity: int, key: Float[Tensor, "entries head_dim"], value: Float[Tensor, "entries head_dim"]
    ) -> Cut:
        """What a head of this capacity holds; its centroids are those that the cut of the context leaves."""
        mask, context = self.mask(capacity, len(key)), len(self.scores)
        gone = ~mask[0, :context]
        if not self.eviction.centroids or not gone.any():
            return Cut(mask, None)
        scores = torch.where(gone, mean_attention(self.scores, self.eviction), 0)[None, None]
        entries = key[None, None, :context], value[None, None, :context]
        centroids = Centroids.empty(entries[0], 1, self.eviction.centroids)
        return Cut(mask, centroids.merge(*entries, scores, PROMPT_KMEANS_ITERATIONS).entries(key.dtype))

    def mask(self, capacity: int, entries: int) -> Bool[Tensor, "queries entries"]:
        """Which entries a head of this capacity holds; between evictions half an interval of it is empty."""
        device, sinks = self.scores.device, self.eviction.sinks
        newest = min(capacity, self.eviction.newest(capacity) + self.eviction.interval // 2)
        quota = max(0, capacity - sinks - newest - self.eviction.interval // 2)
        if capacity >= entries:
            quota = entries
        late = torch.arange(len(self.scores), entries, device=device)
        order = torch.cat([self.scores.argsort(descending=True), late])
        oldest = (self.queries - newest)[:, None]
        competing = (order >= sinks) & (order <= oldest)
        wins = competing & (competing.cumsum(1) <= quota)
        mask = torch.zeros(len(self.queries), entries, dtype=torch.bool, device=device)
        mask[:, order] = wins
        positions = torch.arange(entries, device=device)
        return mask | (positions < sinks) | ((positions > oldest) & (positions <= self.queries[:, None]))


def output(
    layer: LayerPass, head: int, weights: Weights, value: Float[Tensor, "entries channels"], cut: Cut
) -> Float[Tensor, "group queries channels"]:
    """Attention over what is held; `value` may have the channels of several values side by side."""
    held = weights.of_entries * cut.mask
    total, output = held.sum(-1, keepdim=True), held @ value
    if cut.summary is not None:
        extra = layer.standing_in(head, cut.summary, QUERY_STRIDE, weights.peak)
        means = cut.summary.value[0, 0].repeat(1, value.shape[1] // cut.summary.value.shape[3])
        total, output = total + extra.sum(-1, keepdim=True), output + extra.to(means.dtype) @ means
    return output / total.clamp(min=1e-30)


def loss(
    found: Float[Tensor, "group queries head_dim"],
    exact: Float[Tensor, "group queries head_dim"],
    gradient: Float[Tensor, "draws group queries head_dim"],
) -> tuple[float, float]:
    """KL in nats per token, and mean squared relative error, of an output that is not the exact one."""
    found, exact, gradient = found.float(), exact.float(), gradient.float()  # squares leave what 16 bits can say
    wrong = found - exact
    kl = (gradient * wrong).sum((1, 3)).square().mean() / 2
    relative = wrong.square().sum((0, 2)) / exact.square().sum((0, 2)).clamp(min=1e-18)
    return float(kl), float(relative.mean())


def capacities(tokens: int, sinks: int, interval: int) -> tuple[int, ...]:
    """Capacities from max(32, 2 (sinks + interval)) to the whole window, each twice the last.

    A plan may give a head fewer: its curve then goes on as it began.
    """
    found, capacity = [], max(32, 2 * (sinks + interval))
    while capacity < tokens:
        found.append(capacity)
        capacity = 2 * capacity
    return (*(found or [max(1, tokens // 2)]), tokens)


def mean(grids: Sequence[Grid]) -> Grid:
    """Mean over windows."""
    return torch.stack(list(grids)).mean(0)
