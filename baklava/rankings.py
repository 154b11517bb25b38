"""How scores order the entries of a context, kept as a few points per head so that counts for any budget follow."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from baklava.profile import Ranking

POINTS = 40
"""Ranks kept of every head, in equal steps of their logarithm: neighbours are a fifth apart in a context of 3,072."""

LEAST = 1e-12
"""Scores below are nothing at all."""

Curve = tuple[float, ...]


def ranks_of(entries: int) -> tuple[int, ...]:
    """Ranks from 1 to `entries`, most of them small."""
    return tuple(sorted({round(float(rank)) for rank in np.geomspace(1, entries, POINTS)}))


def points(scores: Float[Tensor, "heads entries"], sinks: int, ranks: tuple[int, ...]) -> tuple[Curve, ...]:
    """Logarithms of the scores at these ranks, for each head of a layer; the sinks, which always stay, left out."""
    ordered = scores[:, sinks:].sort(dim=1, descending=True).values
    index = torch.tensor(ranks, device=scores.device) - 1
    kept = ordered[:, index].clamp(min=LEAST).log()
    return tuple(tuple(round(value, 3) for value in head) for head in kept.tolist())


def ranking(contexts: list[list[Float[Tensor, "heads entries"]]], sinks: int) -> Ranking:
    """The ranking of every head, from the scores of one context after another, layer by layer."""
    entries = min(layers[0].shape[1] for layers in contexts) - sinks
    ranks = ranks_of(entries)
    scores = tuple(tuple(points(layer, sinks, ranks) for layer in layers) for layers in contexts)
    return Ranking(tokens=entries, ranks=ranks, scores=scores)
