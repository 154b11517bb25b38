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
from baklava.errors import UserError
from baklava.eviction import KVzip

MAX_FEATURES = 4096
"""Most features of a layer; the squares of more would take gigabytes in all layers of a model."""

BLOCK_TOKENS = 1024
"""Tokens whose features are in memory at a time."""

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
    @torch.inference_mode(mode=False)  # what the first caller runs in, others may not
    def decode(cls, heads: tuple[str, ...]) -> "ScorePredictor":
        """Return the predictor of a layer as a plan has it: per head, float16 numbers in hexadecimal digits."""
        rows = np.stack([np.frombuffer(bytes.fromhex(head), "<f2") for head in heads])
        return cls(torch.from_numpy(rows.astype(np.float32)))

    def encode(self) -> tuple[str, ...]:
        """Return the predictor as a plan has it."""
        scaled = self.weights / self.weights.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return tuple(head.numpy().astype("<f2").tobytes().hex() for head in scaled.cpu())

    def predict(self, key: KVStates, value: KVStates, rotary: RotaryShift) -> Float[Tensor, "batch heads tokens"]:
        """Return a number for each entry of all KV heads, which is higher if it would get more attention.

        Raises:
            UserError: the predictor was fitted to other features.
        """
        with torch.no_grad(), torch.autocast(key.device.type, enabled=False):
            blocks = zip(key.split(BLOCK_TOKENS, 2), value.split(BLOCK_TOKENS, 2), strict=True)
            return torch.cat([self._predict(entry_features(*block, rotary)) for block in blocks], 2)

    def _predict(self, features: Float[Tensor, "batch tokens features"]) -> Float[Tensor, "batch heads tokens"]:
        if features.shape[2] != self.weights.shape[1]:
            raise UserError(
                f"score predictors of {self.weights.shape[1]} weights for entries of {features.shape[2]} features; "
                "give the unchanged plan.json of a search"
            )
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
    # Padding takes no rank among the tokens, so that a row's order does not depend on its neighbours.
    both = (each.masked_fill(~is_real, -torch.inf) for each in (scores, predicted))
    matched, repeated = (each.argsort(dim=2, stable=True).argsort(dim=2).float() for each in both)
    ranks = (1 - share) * matched + share * repeated
    return KVzip.reorder(scores, ranks.masked_fill(~is_real, -1))


class PredictorFit:
    """Fits the predictor of a layer to prompts that were repeated, by sums over their entries in 64 bits."""

    def __init__(self) -> None:
        self.num_entries = 0
        self._sums: list[Tensor] = []

    def add(self, features: Float[Tensor, "entries features"], scores: Float[Tensor, "heads entries"]) -> None:
        """Add the entries of one prompt, with the largest attention that each got from the repetition."""
        # Not every device has 64 bits.
        features, scores = (each.cpu() if each.device.type == "mps" else each for each in (features, scores))
        features, targets = features.double(), scores.double().clamp(min=MIN_SCORE).log().T
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
