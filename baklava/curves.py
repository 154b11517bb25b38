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

from baklava.eviction import Eviction
from baklava.packing import read_back
from baklava.sensitivity import LayerPass

QUERY_STRIDE = 4
"""Of the continuation every fourth query is measured: neighbours agree."""

Grid = Float[Tensor, "heads bits entries"]


@dataclass(frozen=True)
class Lattice:
    """The capacities and the (key, value) bits that curves are measured at, and what evicts."""

    eviction: Eviction
    entries: tuple[int, ...]
    bits: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class HeadPass:
    """One KV head on a continuation: unnormalised attention to every entry, exact outputs, and their gradients."""

    weights: Float[Tensor, "group queries entries"]
    value: Float[Tensor, "entries head_dim"]
    exact: Float[Tensor, "group queries head_dim"]
    gradient: Float[Tensor, "draws group queries head_dim"]

    def losses(self, output: Float[Tensor, "group queries head_dim"]) -> tuple[float, float]:
        """KL in nats per token, and relative error, of an output of this head that is not the exact one."""
        wrong = output - self.exact
        kl = (self.gradient * wrong).sum((1, 3)).square().mean() / 2
        norm = self.exact.square().sum((0, 2)).sqrt().clamp(min=1e-9)
        return float(kl), float((wrong.square().sum((0, 2)).sqrt() / norm).mean())


def losses(layer: LayerPass, scores: Float[Tensor, "heads context"], lattice: Lattice) -> tuple[Grid, Grid]:
    """Expected KL and relative error of every head of a layer, on the lattice.

    `scores` are those of the context; the continuation competes for the same capacity through the recent window.
    """
    shape = (layer.key.shape[0], len(lattice.bits), len(lattice.entries))
    kl, error = torch.zeros(shape), torch.zeros(shape)
    order = scores.argsort(dim=1, descending=True)
    sinks, key_bits, value_bits = lattice.eviction.sinks, *(set(side) for side in zip(*lattice.bits, strict=True))
    keys = {bits: read_back(layer.key, bits, sinks, centred=True) for bits in key_bits}
    values = {bits: read_back(layer.value, bits, sinks, centred=False) for bits in value_bits}
    for head in range(shape[0]):
        exact = _exact(layer, head)
        for of_keys in keys:
            weights = layer.weights(head, keys[of_keys][head], QUERY_STRIDE)
            for i, pair in enumerate(lattice.bits):
                if pair[0] == of_keys:
                    passed = HeadPass(weights, values[pair[1]][head], *exact)
                    for j, capacity in enumerate(lattice.entries):
                        output = kept_output(passed, order[head], capacity, lattice.eviction)
                        kl[head, i, j], error[head, i, j] = passed.losses(output)
    return kl, error


def _exact(layer: LayerPass, head: int) -> tuple[Tensor, Tensor]:
    weights = layer.weights(head, layer.key[head], QUERY_STRIDE)
    exact = weights @ layer.value[head] / weights.sum(-1, keepdim=True)
    return exact, layer.gradient[:, head, :, ::QUERY_STRIDE]


def kept_output(
    passed: HeadPass, order: Int[Tensor, " context"], capacity: int, eviction: Eviction
) -> Float[Tensor, "group queries head_dim"]:
    """Output over what a head of this capacity holds for each query: sinks, the best of the context, and the newest.

    Between evictions a head holds on average half an interval less than its capacity.
    """
    entries, context = passed.value.shape[0], len(order)
    newest = eviction.newest(capacity) + eviction.interval // 2
    start = max(eviction.sinks, context - newest)
    sinks = torch.arange(min(eviction.sinks, context), device=order.device)
    best = order[(order >= eviction.sinks) & (order < start)][: max(0, capacity - eviction.sinks - newest)]
    early, late = torch.cat([sinks, best]), slice(start, entries)
    recent = passed.weights[:, :, late] * _band(passed.weights.shape[1], start, entries, context, newest, order.device)
    kept = passed.weights[:, :, early]
    total = kept.sum(-1, keepdim=True) + recent.sum(-1, keepdim=True)
    return (kept @ passed.value[early] + recent @ passed.value[late]) / total.clamp(min=1e-30)


def _band(
    queries: int, start: int, entries: int, context: int, newest: int, device: torch.device
) -> Bool[Tensor, "queries late"]:
    """Which of the entries from `start` on are among the `newest` of each measured query."""
    rows = torch.arange(context, entries, QUERY_STRIDE, device=device)[:queries, None]
    return torch.arange(start, entries, device=device) > rows - max(1, newest)


def capacities(tokens: int, sinks: int, interval: int) -> tuple[int, ...]:
    """Capacities from the least that a head can live with to the whole window, each twice the last."""
    found, capacity = [], max(32, 2 * (sinks + interval))
    while capacity < tokens:
        found.append(capacity)
        capacity = 2 * capacity
    return (*found, tokens)


def mean(grids: Sequence[Grid]) -> Grid:
    """Mean over windows."""
    return torch.stack(list(grids)).mean(0)
