"""How the log-likelihood of a continuation depends on the output of every head."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava.cache import attention
from baklava.cache.attention import AttentionParams, CentroidEntries, split_gqa_groups
from baklava.cache.recording_layer import Recording
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
    """

    unnormalized: Float[Tensor, "group queries entries"]
    max_logit: Float[Tensor, "group queries 1"]


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
        return AttentionWeights(logits.sub_(max_logit).exp_(), max_logit)

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
    """Run one forward and `NUM_DRAWS` backward passes of a continuation after a recorded context."""
    calls: list[AttentionCall] = []

    def on_attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, output: Tensor, params: AttentionParams
    ) -> None:
        output.retain_grad()
        calls.append((query, key, value, output, params))

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _frozen_weights(loaded),
        attention.attention_hook(on_attention),
    ):
        # Copies: tensors made in inference mode cannot take part in a backward pass.
        keys, values = (tuple(layer.clone() for layer in side) for side in (recording.keys, recording.values))
        cache = Recording(keys, values, scores=()).to_dynamic_cache()
        embedded = loaded.model.get_input_embeddings()(ids.clone()).detach().requires_grad_()
        logits = loaded.model(inputs_embeds=embedded, past_key_values=cache).logits[0].float()
        outputs = [output for _, _, _, output, _ in calls]
        draws = [_sampled_gradients(logits, outputs, seed + draw) for draw in range(NUM_DRAWS)]
    return [_layer_trace(call, [gradients[index] for gradients in draws]) for index, call in enumerate(calls)]


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
