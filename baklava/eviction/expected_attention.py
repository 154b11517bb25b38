"""Expected attention: what queries like the last ones would attend to stays."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from baklava.eviction.base import Eviction, Observation, Sample
from baklava.eviction.snapkv import fading


@dataclass(frozen=True)
class ExpectedAttention(Eviction):
    """Keep the entries with most expected attention times value norm (Expected Attention, arXiv 2510.00636).

    The queries to come are taken to be normal, with the mean and covariance of the prompt's last `window` queries. The
    paper turns that mean to the positions to come; here queries keep the positions that they had, so that no model's
    RoPE needs to be known; softcaps and sink logits do not enter. In decoding the attention really received takes over,
    fading over `window` tokens.

    Cost: two products of the keys with a head_dim² matrix per prompt; no probabilities of a prompt.
    """

    name: ClassVar[str] = "expected_attention"

    window: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.window >= 2, "window must be at least 2")

    @override
    @property
    def sample(self) -> Sample:
        return Sample(window=self.window, whole=True)

    @override
    def score(self, seen: Observation) -> Float[Tensor, "batch heads entries"]:
        size = seen.value.float().norm(dim=-1)
        if seen.decoding:
            return fading(seen.previous, seen.over_group("mean") * size[:, :, None], self.window)
        return self._expected(seen) * size

    def _expected(self, seen: Observation) -> Float[Tensor, "batch heads entries"]:
        """Mean over the query group of softmax(E[log of the attention weight] + half its variance)."""
        mean, covariance = _moments(seen)
        key = seen.key.float()[:, :, None]
        logits = (key @ mean[..., None])[..., 0] * seen.scaling
        logits += ((key @ covariance) * key).sum(-1) * (seen.scaling**2 / 2)
        hidden = (seen.key_positions < 0)[:, :, None]
        return logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num().mean(2)


def _moments(seen: Observation) -> tuple[Tensor, Tensor]:
    """Mean [.., head_dim] and covariance [.., head_dim, head_dim] of each query head's real queries."""
    real = (seen.query_positions >= 0)[:, None, None, :, None]
    query = seen.query.float() * real
    count = real.sum(3).clamp(min=1)
    mean = query.sum(3) / count
    centred = (query - mean[..., None, :]) * real
    return mean, centred.transpose(3, 4) @ centred / count[..., None]
