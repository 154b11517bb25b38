"""Predict how much a repetition of a prompt would look at an entry, from the keys and values that its layer stores.

KVzap (arXiv 2601.07891) predicts the scores of KVzip from hidden states. Keys and values are linear images of these,
and a cache has them of a prompt that runs now as of one that was recorded.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from baklava.cache.attention import KVStates
from baklava.cache.rotary_shift import RotaryShift
from baklava.eviction import KVzip

RIDGE = 0.01
"""Ridge of the fit, as a share of the variance of the features."""

MIN_VARIANCE = 1e-9
"""Ridge of all features, as a share of their mean variance."""

MIN_SCORE = 1e-6
"""Scores below this are fitted as this; their logarithms say nothing."""


@dataclass(frozen=True, eq=False)
class ScorePredictor:
    """A linear predictor for each KV head of a layer, which takes the features of all of its KV heads.

    Only the order of predictions counts, so there is no constant.
    """

    weights: Float[Tensor, "heads features"]

    @classmethod
    @lru_cache(maxsize=1024)
    def decode(cls, heads: tuple[str, ...]) -> "ScorePredictor":
        """Return the predictor of a layer as a plan has it: per head, float16 numbers in hexadecimal digits."""
        rows = np.stack([np.frombuffer(bytes.fromhex(head), "<f2") for head in heads])
        return cls(torch.from_numpy(rows.astype(np.float32)))

    def encode(self) -> tuple[str, ...]:
        """Return the predictor as a plan has it."""
        scaled = self.weights / self.weights.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return tuple(head.numpy().astype("<f2").tobytes().hex() for head in scaled.cpu())

    def predict(self, key: KVStates, value: KVStates, rotary: RotaryShift) -> Float[Tensor, "batch heads tokens"]:
        """Return a number for each entry of all KV heads, which is higher if it would get more attention."""
        features = entry_features(key, value, rotary)
        return (features @ self.weights.to(features.device).T).transpose(1, 2)


def entry_features(key: KVStates, value: KVStates, rotary: RotaryShift) -> Float[Tensor, "batch tokens features"]:
    """Return what entries are predicted from: their values, the size of these, and of keys what no position changes."""
    value = value.float()
    features = torch.cat([value, value.norm(dim=3, keepdim=True), rotary.invariants(key)], 3)
    return features.transpose(1, 2).flatten(2)


def mix_orders(
    scores: Float[Tensor, "batch heads tokens"],
    predicted: Float[Tensor, "batch heads tokens"],
    share: float,
    is_real: Bool[Tensor, "#batch #heads tokens"],
) -> Float[Tensor, "batch heads tokens"]:
    """Return the scores of a prompt's tokens in the order of the weighted ranks of both; padding goes last.

    Args:
        scores: Scores by an eviction method.
        predicted: Predictions for the same tokens.
        share: Weight of the predicted ranks.
        is_real: Which tokens are not padding.
    """
    matched, repeated = (each.argsort(dim=2, stable=True).argsort(dim=2).float() for each in (scores, predicted))
    ranks = (1 - share) * matched + share * repeated
    return KVzip.reorder(scores, ranks.masked_fill(~is_real, -1))


class PredictorFit:
    """Fits the predictor of a layer to prompts that were repeated, by sums over their entries in 64 bits."""

    def __init__(self) -> None:
        self.num_entries = 0
        self._sums: list[Tensor] = []

    def add(self, features: Float[Tensor, "entries features"], scores: Float[Tensor, "heads entries"]) -> None:
        """Add the entries of one prompt, with the largest attention that each got from the repetition."""
        features = features.double()
        targets = scores.double().clamp(min=MIN_SCORE).log().T
        sums = [features.sum(0), targets.sum(0), features.T @ features, features.T @ targets]
        self._sums = [before + new for before, new in zip(self._sums, sums, strict=True)] if self._sums else sums
        self.num_entries += len(features)

    def solve(self) -> ScorePredictor:
        """Return the ridge regression of the logarithms of the scores."""
        features, targets, squares, products = (each / self.num_entries for each in self._sums)
        covariance = squares - features[:, None] * features
        sizes = covariance.diagonal().clamp(min=0)
        # A feature that never changes has no variance of its own.
        covariance += torch.diag(RIDGE * sizes + MIN_VARIANCE * sizes.mean().clamp(min=MIN_VARIANCE))
        weights = torch.linalg.solve(covariance, products - features[:, None] * targets)
        return ScorePredictor(weights.T.float())
