"""Expected attention: the entries that future queries are expected to attend to stay."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from baklava.eviction.base import Eviction, Observation, QuerySample
from baklava.eviction.snapkv import exponential_moving_average


@dataclass(frozen=True)
class ExpectedAttention(Eviction):
    """Keep the entries with the largest product of expected attention and value norm (arXiv 2510.00636).

    Future queries are modelled as normal, with the mean and covariance of the prompt's last `window` queries. The paper
    rotates that mean to the future positions. Here queries keep their positions, so that no model's RoPE needs to be
    known; softcaps and sink logits are ignored. In decoding, the attention received replaces the expected one, averaged
    over about `window` tokens.

    Cost: two products of the keys with a head_dim² matrix per prompt; no attention probabilities of a prompt.
    """

    name: ClassVar[str] = "expected_attention"

    window: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.window >= 2, "window must be at least 2")

    @override
    @property
    def query_sample(self) -> QuerySample:
        return QuerySample(window=self.window, single_block=True)

    @override
    def score(self, observation: Observation) -> Float[Tensor, "batch heads entries"]:
        value_norm = observation.value.float().norm(dim=-1)
        if observation.decoding:
            received = observation.reduce_group("mean") * value_norm[:, :, None]
            return exponential_moving_average(observation.previous_scores, received, self.window)
        # mean over the query group of softmax(E[logit] + Var[logit] / 2)
        mean, covariance = _query_moments(observation)
        key = observation.key.float()[:, :, None]
        logits = (key @ mean[..., None])[..., 0] * observation.scaling
        logits += ((key @ covariance) * key).sum(-1) * (observation.scaling**2 / 2)
        is_padding = (observation.key_positions < 0)[:, :, None]
        expected = logits.masked_fill(is_padding, -torch.inf).softmax(-1).nan_to_num().mean(2)
        return expected * value_norm


def _query_moments(observation: Observation) -> tuple[Tensor, Tensor]:
    """Return the mean [.., head_dim] and covariance [.., head_dim, head_dim] of each query head's real queries."""
    is_real = (observation.query_positions >= 0)[:, None, None, :, None]
    query = observation.query.float() * is_real
    count = is_real.sum(3).clamp(min=1)
    mean = query.sum(3) / count
    centred = (query - mean[..., None, :]) * is_real
    return mean, centred.transpose(3, 4) @ centred / count[..., None]
