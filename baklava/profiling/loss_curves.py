"""Loss curves: what a head alone costs if it keeps fewer entries in fewer bits, from one pass per window.

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
from baklava.profiling.output_gradients import AttentionWeights, LayerTrace

QUERY_STRIDE = 4
"""Every fourth query of the continuation is measured, since neighbours are alike."""

LossGrid = Float[Tensor, "heads bits entries"]


@dataclass(frozen=True)
class CurveGrid:
    """The capacities and the (key, value) bits at which curves are measured, and the eviction method.

    Errors of keys and of values are independent. Each is measured with the other exact, and the loss of a pair is what
    eviction loses plus what each of the two adds.
    """

    eviction: Eviction
    entries: tuple[int, ...]
    bits: tuple[tuple[int, int], ...]

    @property
    def key_bits(self) -> tuple[int, ...]:
        """Bits of keys in any pair, descending from the exact ones."""
        return tuple(sorted({FULL_BITS, *(keys for keys, _ in self.bits)}, reverse=True))

    @property
    def value_bits(self) -> tuple[int, ...]:
        """Bits of values in any pair, descending from the exact ones."""
        return tuple(sorted({FULL_BITS, *(values for _, values in self.bits)}, reverse=True))

    def combine(
        self, keys: Float[Tensor, "heads key_bits entries"], values: Float[Tensor, "heads value_bits entries"]
    ) -> Float[Tensor, "heads pairs entries"]:
        """Return the losses of the pairs, from those of keys alone and of values alone in fewer bits."""
        exact = keys[:, 0]
        rows = [keys[:, self.key_bits.index(k)] + values[:, self.value_bits.index(v)] - exact for k, v in self.bits]
        return torch.stack(rows, 1).clamp(min=0)


def layer_losses(
    layer: LayerTrace, scores: Float[Tensor, "heads context"], grid: CurveGrid
) -> tuple[LossGrid, LossGrid]:
    """Return the expected KL in nats per token, and the relative error, of every head of a layer on the grid.

    The relative error is the root of its mean square over the queries.

    Args:
        layer: the layer on the continuation.
        scores: scores of the context; the continuation competes for the same capacity.
        grid: capacities and bits.
    """
    sinks, order = grid.eviction.sinks, channel_sizes(layer, grid.eviction.sinks).argsort(descending=True)
    keys = [fake_quantize(layer.key, bits, sinks, centred=True, order=order) for bits in grid.key_bits]
    values = [fake_quantize(layer.value, bits, sinks, centred=False) for bits in grid.value_bits]
    heads = [_head_losses(layer, head, scores[head], grid, keys, values) for head in range(len(scores))]
    by_keys, by_values = (torch.stack(side) for side in zip(*heads, strict=True))
    kl, squared_error = (grid.combine(by_keys[..., i], by_values[..., i]) for i in (0, 1))
    return kl, squared_error.sqrt()


def channel_sizes(layer: LayerTrace, sinks: int) -> Float[Tensor, "heads head_dim"]:
    """Return the contribution of each channel to the logits: RMS of the centred keys times RMS of the queries."""
    key = layer.key[:, sinks:].float()
    deviation = (key - key.mean(1, keepdim=True)).square().mean(1).sqrt()
    return deviation * layer.query.float().square().mean((1, 2)).sqrt()


def _head_losses(
    layer: LayerTrace,
    head: int,
    scores: Float[Tensor, " context"],
    grid: CurveGrid,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> tuple[Float[Tensor, "key_bits entries 2"], Float[Tensor, "value_bits entries 2"]]:
    """Return KL and squared relative error per bits of the keys, and per bits of the values, at every capacity."""
    retention = RetentionModel(scores, layer.query_positions(QUERY_STRIDE), grid.eviction)
    retained_sets = [retention.retain(capacity, layer.key[head], layer.value[head]) for capacity in grid.entries]
    weights = [layer.weights(head, key[head], QUERY_STRIDE) for key in keys]
    exact_weights = weights[0].unnormalized
    exact = exact_weights @ layer.value[head] / exact_weights.sum(-1, keepdim=True)
    gradient = layer.gradient[:, head, :, ::QUERY_STRIDE]
    by_keys = [
        [
            output_loss(attention_output(layer, head, key_weights, layer.value[head], retained), exact, gradient)
            for retained in retained_sets
        ]
        for key_weights in weights
    ]
    all_values = torch.cat([value[head] for value in values], 1)
    outputs = [
        attention_output(layer, head, weights[0], all_values, retained).chunk(len(values), -1)
        for retained in retained_sets
    ]
    by_values = [[output_loss(output[i], exact, gradient) for output in outputs] for i in range(len(values))]
    return torch.tensor(by_keys), torch.tensor(by_values)


@dataclass(frozen=True)
class RetainedSet:
    """Which entries a head keeps for each measured query, and the centroids of the others, if there are any."""

    mask: Bool[Tensor, "queries entries"]
    centroids: CentroidEntries | None


@dataclass(frozen=True)
class RetentionModel:
    """A model of what a head keeps for each measured query: sinks, the newest, and the best of the rest.

    `scores` are those of the context; evicted entries of the continuation rank last.
    """

    scores: Float[Tensor, " context"]
    query_positions: Int[Tensor, " queries"]
    eviction: Eviction

    def retain(
        self, capacity: int, key: Float[Tensor, "entries head_dim"], value: Float[Tensor, "entries head_dim"]
    ) -> RetainedSet:
        """Return what a head of this capacity keeps; its centroids are those after compressing the context."""
        mask, context = self.mask(capacity, len(key)), len(self.scores)
        evicted = ~mask[0, :context]
        if not self.eviction.centroids or not evicted.any():
            return RetainedSet(mask, None)
        weight = torch.where(evicted, mean_attention(self.scores, self.eviction), 0)[None, None]
        entries = key[None, None, :context], value[None, None, :context]
        centroids = Centroids.empty(entries[0], 1, self.eviction.centroids)
        return RetainedSet(mask, centroids.merge(*entries, weight, PROMPT_KMEANS_ITERATIONS).entries(key.dtype))

    def mask(self, capacity: int, entries: int) -> Bool[Tensor, "queries entries"]:
        """Return which entries a head of this capacity keeps; on average half an eviction interval of it is empty."""
        device, sinks, half_interval = self.scores.device, self.eviction.sinks, self.eviction.eviction_interval // 2
        num_recent = min(capacity, self.eviction.recent_window(capacity) + half_interval)
        num_best = entries if capacity >= entries else max(0, capacity - sinks - num_recent - half_interval)
        continuation = torch.arange(len(self.scores), entries, device=device)
        order = torch.cat([self.scores.argsort(descending=True), continuation])
        last_competing = (self.query_positions - num_recent)[:, None]
        competes = (order >= sinks) & (order <= last_competing)
        mask = torch.zeros(len(self.query_positions), entries, dtype=torch.bool, device=device)
        mask[:, order] = competes & (competes.cumsum(1) <= num_best)
        positions = torch.arange(entries, device=device)
        is_recent = (positions > last_competing) & (positions <= self.query_positions[:, None])
        return mask | (positions < sinks) | is_recent


def attention_output(
    layer: LayerTrace,
    head: int,
    weights: AttentionWeights,
    value: Float[Tensor, "entries channels"],
    retained: RetainedSet,
) -> Float[Tensor, "group queries channels"]:
    """Return attention over the retained entries; `value` may have the channels of several values side by side."""
    retained_weights = weights.unnormalized * retained.mask
    total, output = retained_weights.sum(-1, keepdim=True), retained_weights @ value
    if retained.centroids is not None:
        extra = layer.centroid_weights(head, retained.centroids, QUERY_STRIDE, weights.max_logit)
        means = retained.centroids.value[0, 0].repeat(1, value.shape[1] // retained.centroids.value.shape[3])
        total, output = total + extra.sum(-1, keepdim=True), output + extra.to(means.dtype) @ means
    return output / total.clamp(min=1e-30)


def output_loss(
    output: Float[Tensor, "group queries head_dim"],
    exact: Float[Tensor, "group queries head_dim"],
    gradient: Float[Tensor, "draws group queries head_dim"],
) -> tuple[float, float]:
    """Return the KL in nats per token, and the mean squared relative error, of an inexact output."""
    output, exact, gradient = output.float(), exact.float(), gradient.float()  # squares exceed the range of 16 bits
    error = output - exact
    kl = (gradient * error).sum((1, 3)).square().mean() / 2
    relative = error.square().sum((0, 2)) / exact.square().sum((0, 2)).clamp(min=1e-18)
    return float(kl), float(relative.mean())


def curve_capacities(tokens: int, sinks: int, eviction_interval: int) -> tuple[int, ...]:
    """Return capacities from max(32, 2 (sinks + eviction_interval)) to the whole window, each twice the previous.

    A plan may give a head fewer entries; its curve is then extrapolated.
    """
    capacities, capacity = [], max(32, 2 * (sinks + eviction_interval))
    while capacity < tokens:
        capacities.append(capacity)
        capacity *= 2
    return (*(capacities or [max(1, tokens // 2)]), tokens)
