"""Sensitivity: how the log-likelihood of a continuation answers to the output of every head."""

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

DRAWS = 1
"""Continuations drawn for the gradient; each costs a backward pass."""


@dataclass(frozen=True)
class Weights:
    """Attention before it is divided by its sum, and the logits that the largest of each query stand for."""

    of_entries: Float[Tensor, "group queries entries"]
    peak: Float[Tensor, "group queries 1"]


@dataclass(frozen=True)
class LayerPass:
    """What one layer did on a continuation: its queries, all entries, and the gradient of each output per draw."""

    query: Float[Tensor, "heads group queries head_dim"]
    key: Float[Tensor, "heads entries head_dim"]
    value: Float[Tensor, "heads entries head_dim"]
    gradient: Float[Tensor, "draws heads group queries head_dim"]
    kernel: AttentionParams

    def positions(self, stride: int) -> Int[Tensor, " queries"]:
        """Positions of every `stride`-th query; the last entries are the queries' own."""
        entries, queries = self.key.shape[1], self.query.shape[2]
        return torch.arange(entries - queries, entries, stride, device=self.key.device)

    def weights(self, head: int, key: Float[Tensor, "entries head_dim"], stride: int) -> "Weights":
        """Attention of every `stride`-th query of a head over these keys, before it is divided by its sum."""
        logits = self._logits(head, key, stride)
        unseen = torch.arange(key.shape[0], device=key.device) > self.positions(stride)[:, None]
        peak = logits.masked_fill_(unseen, -torch.inf).amax(-1, keepdim=True)
        return Weights(logits.sub_(peak).exp_(), peak)

    def standing_in(
        self, head: int, summary: CentroidEntries, stride: int, peak: Float[Tensor, "group queries 1"]
    ) -> Float[Tensor, "group queries summaries"]:
        """The same for a summary of one head, beside weights whose largest logits are these."""
        return (self._logits(head, summary.key[0, 0], stride) + summary.bias[0, 0] - peak).exp()

    def _logits(
        self, head: int, key: Float[Tensor, "entries head_dim"], stride: int
    ) -> Float[Tensor, "group queries entries"]:
        logits = self.query[head, :, ::stride] @ key.T * self.kernel.scaling
        cap = self.kernel.softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap


def passed(loaded: LoadedModel, recording: Recording, ids: Int[Tensor, "1 tokens"], seed: int) -> list[LayerPass]:
    """One forward and `DRAWS` backward passes of a continuation behind a recorded context, layer by layer."""
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor, AttentionParams]] = []

    def watch(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, output: Tensor, kernel: AttentionParams
    ) -> None:
        output.retain_grad()
        seen.append((query, key, value, output, kernel))

    with torch.inference_mode(False), torch.enable_grad(), _frozen(loaded), attention.attention_hook(watch):
        # Copies: what was made in inference mode cannot take part in a backward pass.
        keys, values = (tuple(each.clone() for each in side) for side in (recording.keys, recording.values))
        cache = Recording(keys, values, scores=()).to_dynamic_cache()
        embedded = loaded.model.get_input_embeddings()(ids.clone()).detach().requires_grad_()
        logits = loaded.model(inputs_embeds=embedded, past_key_values=cache).logits[0].float()
        draws = [_gradients(logits, [each[3] for each in seen], seed + draw) for draw in range(DRAWS)]
    return [_layer(each, [gradients[index] for gradients in draws]) for index, each in enumerate(seen)]


@contextmanager
def _frozen(loaded: LoadedModel) -> Iterator[None]:
    """The weights need no gradients of their own."""
    asked = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def _gradients(logits: Float[Tensor, "tokens vocabulary"], outputs: list[Tensor], seed: int) -> list[Tensor]:
    """Gradients, with respect to the outputs, of the log-likelihood of tokens drawn from these logits."""
    draw = torch.Generator(device=logits.device).manual_seed(seed)
    tokens = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)
    likelihood = logits.log_softmax(-1).gather(-1, tokens).sum()
    return list(torch.autograd.grad(likelihood, outputs, retain_graph=True))


def _layer(seen: tuple[Tensor, Tensor, Tensor, Tensor, AttentionParams], gradients: list[Tensor]) -> LayerPass:
    query, key, value, _, kernel = seen
    group = query.shape[1] // key.shape[1]
    stacked = torch.stack([split_gqa_groups(gradient.transpose(1, 2), group)[0] for gradient in gradients])
    return LayerPass(split_gqa_groups(query, group)[0].detach(), key[0].detach(), value[0].detach(), stacked, kernel)
