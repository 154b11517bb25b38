"""Heavy hitters: the entries that received the most attention stay."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from baklava.eviction.base import Eviction, Observation, QuerySample


@dataclass(frozen=True)
class HeavyHitter(Eviction):
    """Keep the entries with the highest mean attention from the queries that saw them (H2O, arXiv 2306.14048).

    The mean is a running one, so decoding continues from the prompt. The defaults were the best in our measurements
    (docs/lab-notes.md). H2O itself is reduction "mean", power 1, distance 0.

    Attributes:
        reduction: how the query group of a KV head is reduced.
        power: 1 ranks by the mean attention, 2 by the mean square.
        distance: only queries at least this many tokens after an entry count, since near tokens always attend to each
            other.
        stride: of a prompt, only every `stride`-th query is observed.

    Cost: the attention probabilities of every `stride`-th query of a prompt; in decoding, a pass over the scores per
    token.
    """

    name: ClassVar[str] = "heavy_hitter"

    reduction: Literal["mean", "max"] = "max"
    power: Literal[1, 2] = 2
    distance: int = 32
    stride: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.reduction in ("mean", "max") and self.power in (1, 2) and self.distance >= 0 and self.stride >= 1,
            "reduction must be mean or max, power 1 or 2, distance at least 0, stride at least 1",
        )

    @override
    @property
    def query_sample(self) -> QuerySample:
        return QuerySample(stride=self.stride)

    @override
    @property
    def attention_power(self) -> float:
        return self.power

    @override
    def score(self, observation: Observation) -> Float[Tensor, "batch heads entries"]:
        attention = observation.reduce_group(self.reduction).float()  # the square of 1/5000 is 0 in float16
        if self.power == 2:
            attention = attention.square()
        if self.distance:
            distances = observation.query_positions[:, None, :, None] - observation.key_positions[:, :, None, :]
            attention = torch.where(distances >= self.distance, attention, 0)
        before = self._num_queries(observation.first_query_position - observation.stride, observation)
        after = self._num_queries(observation.last_query_position, observation)
        return (observation.previous_scores * before + attention.sum(2)) / after.clamp(min=1)

    def _num_queries(self, last: Tensor, observation: Observation) -> Tensor:
        """Return how many of the queries up to position `last` count for each entry."""
        since = last - observation.key_positions
        if self.distance:
            since = since - self.distance
        if observation.stride > 1:
            since = since.div(observation.stride, rounding_mode="floor")
        return (since + 1).clamp(min=0)
