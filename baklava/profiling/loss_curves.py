"""Loss curves: what a head alone costs if it keeps fewer entries in fewer bits, from one pass per window.

The loss of a head is predicted to second order. With g the gradient of the log-likelihood of tokens that the model
itself draws, with respect to the head's output, and d the error that a smaller cache makes in that output,
E[(g·d)²] / 2 is the KL between the full and the smaller model (the Fisher information is its curvature). Summed over
tokens, with errors at different tokens taken as independent, it is in nats, so the losses of heads can be compared and
added. The gradient needs a backward pass through the continuation alone; the context stays a constant.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from baklava.cache import attention
from baklava.cache.attention import AttentionParams, CentroidEntries, split_gqa_groups
from baklava.cache.head_groups.centroids import PROMPT_KMEANS_ITERATIONS, Centroids, mean_attention
from baklava.cache.recording_layer import Recording
from baklava.cache.storage.fake_quantize import fake_quantize
from baklava.errors import UserError
from baklava.eviction import Eviction
from baklava.plan.geometry import FULL_BITS
from baklava.runtime.model_loader import LoadedModel

NUM_DRAWS = 1
"""Continuations drawn for the gradient; each costs a backward pass."""

AttentionCall = tuple[Tensor, Tensor, Tensor, Tensor, AttentionParams]
"""Query, key, value, output and parameters of one attention."""


@dataclass(frozen=True)
class AttentionWeights:
    """Attention before it is divided by its sum.

    Attributes:
        unnormalized: exp(logit - max_logit) per entry.
        max_logit: the largest logit of each query.
        sink: what a learned sink adds to the sum; 0 without one.
    """

    unnormalized: Float[Tensor, "group queries entries"]
    max_logit: Float[Tensor, "group queries 1"]
    sink: Float[Tensor, "group queries 1"]


@dataclass(frozen=True)
class LayerTrace:
    """What one layer did on a continuation: its queries, all entries, and the gradient of each output per draw."""

    query: Float[Tensor, "heads group queries head_dim"]
    key: Float[Tensor, "heads entries head_dim"]
    value: Float[Tensor, "heads entries head_dim"]
    gradient: Float[Tensor, "draws heads group queries head_dim"]
    params: AttentionParams

    def query_positions(self, stride: int) -> Int[Tensor, " queries"]:
        """Return the positions of every `stride`-th query; the last entries are the queries' own."""
        entries, queries = self.key.shape[1], self.query.shape[2]
        return torch.arange(entries - queries, entries, stride, device=self.key.device)

    def weights(self, head: int, key: Float[Tensor, "entries head_dim"], stride: int) -> AttentionWeights:
        """Return the attention of every `stride`-th query of a head over these keys."""
        logits = self._logits(head, key, stride)
        is_future = torch.arange(key.shape[0], device=key.device) > self.query_positions(stride)[:, None]
        max_logit = logits.masked_fill_(is_future, -torch.inf).amax(-1, keepdim=True)
        sink = torch.zeros_like(max_logit)
        if self.params.sink_logits is not None:
            sink = (self.params.sink_logits.view(len(self.query), -1, 1, 1)[head] - max_logit).exp()
        return AttentionWeights(logits.sub_(max_logit).exp_(), max_logit, sink)

    def centroid_weights(
        self, head: int, centroids: CentroidEntries, stride: int, max_logit: Float[Tensor, "group queries 1"]
    ) -> Float[Tensor, "group queries centroids"]:
        """Return the weights of the centroids of one head, in the scale of weights with these largest logits."""
        return (self._logits(head, centroids.key[0, 0], stride) + centroids.bias[0, 0] - max_logit).exp()

    def _logits(
        self, head: int, key: Float[Tensor, "entries head_dim"], stride: int
    ) -> Float[Tensor, "group queries entries"]:
        logits = self.query[head, :, ::stride] @ key.T * self.params.scaling
        softcap = self.params.softcap
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def trace_layers(
    loaded: LoadedModel, recording: Recording, ids: Int[Tensor, "1 tokens"], seed: int
) -> list[LayerTrace]:
    """Run one forward and `NUM_DRAWS` backward passes of a continuation after a recorded context.

    Return what the layers with full attention did. The queries of layers that share their keys count as theirs.
    """
    geometry = loaded.geometry
    calls: dict[int, list[AttentionCall]] = {layer: [] for layer in geometry.full_attention_layers}

    def on_attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, output: Tensor, params: AttentionParams
    ) -> None:
        layer = geometry.kv_layer(int(module.layer_idx))  # type: ignore[arg-type]
        if layer not in calls:
            return
        if not output.requires_grad:
            raise UserError(
                f"{loaded.identity.id} runs some layers without gradients, so their losses cannot be measured; "
                "choose a plan that needs no profile"
            )
        output.retain_grad()
        calls[layer].append((query, key, value, output, params))

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _frozen_weights(loaded),
        attention.attention_hook(on_attention),
    ):
        # Copies: tensors made in inference mode cannot take part in a backward pass.
        keys, values = (tuple(layer.clone() for layer in side) for side in (recording.keys, recording.values))
        cache = replace(recording, keys=keys, values=values).to_dynamic_cache()
        embedded = loaded.model.get_input_embeddings()(ids.clone()).detach().requires_grad_()
        # A copy, since some models change it.
        logits = loaded.model(inputs_embeds=embedded.clone(), past_key_values=cache).logits[0].float()
        outputs = [output for layer in calls.values() for _, _, _, output, _ in layer]
        draws = [iter(_sampled_gradients(logits, outputs, seed + draw)) for draw in range(NUM_DRAWS)]
    return [_merged([_layer_trace(call, [next(draw) for draw in draws]) for call in layer]) for layer in calls.values()]


@contextmanager
def _frozen_weights(loaded: LoadedModel) -> Iterator[None]:
    trainable = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _sampled_gradients(logits: Float[Tensor, "tokens vocabulary"], outputs: list[Tensor], seed: int) -> list[Tensor]:
    """Return the gradients, by the outputs, of the log-likelihood of tokens drawn from these logits."""
    generator = torch.Generator(device=logits.device).manual_seed(seed)
    tokens = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
    likelihood = logits.log_softmax(-1).gather(-1, tokens).sum()
    return list(torch.autograd.grad(likelihood, outputs, retain_graph=True))


def _layer_trace(call: AttentionCall, gradients: list[Tensor]) -> LayerTrace:
    query, key, value, _, params = call
    group = query.shape[1] // key.shape[1]
    gradient = torch.stack([split_gqa_groups(gradient.transpose(1, 2), group)[0] for gradient in gradients])
    return LayerTrace(split_gqa_groups(query, group)[0].detach(), key[0].detach(), value[0].detach(), gradient, params)


def _merged(traces: list[LayerTrace]) -> LayerTrace:
    """Return the traces of layers that share their keys as one layer with the query heads of all of them."""
    first, params = traces[0], traces[0].params
    sinks = [trace.params.sink_logits for trace in traces]
    if len(traces) > 1 and sinks[0] is not None:
        by_head = [sink.view(len(first.query), -1) for sink in sinks if sink is not None]
        params = replace(params, sink_logits=torch.cat(by_head, 1).flatten())
    query, gradient = torch.cat([each.query for each in traces], 1), torch.cat([each.gradient for each in traces], 2)
    return replace(first, query=query, gradient=gradient, params=params)


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
    exact = exact_weights @ layer.value[head] / (exact_weights.sum(-1, keepdim=True) + weights[0].sink)
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
    total, output = retained_weights.sum(-1, keepdim=True) + weights.sink, retained_weights @ value
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
