"""Heavy hitters: what has been attended to stays."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from baklava.eviction.base import Eviction, Observation, Sample


@dataclass(frozen=True)
class HeavyHitter(Eviction):
    """Keep the entries that received most attention, as a mean over the queries that saw them (H2O, arXiv 2306.14048).

    `reduction` joins the query group of a KV head; `power` 1 is the mean, 2 ranks by the mean square; only queries at
    least `distance` tokens after an entry count, since near tokens attend to each other anyway; of a prompt only every
    `stride`-th query is observed. The mean is a running one, so decoding goes on where the prompt ended.

    The defaults keep most (measured, docs/lab-notes.md); H2O itself is reduction "mean", power 1, distance 0.

    Cost: the probabilities of every `stride`-th query of a prompt; in decoding, a pass over the scores per token.
    """

    name: ClassVar[str] = "heavy_hitter"

    reduction: Literal["mean", "max"] = "max"
    power: Literal[1, 2] = 2
    distance: int = 32
    stride: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        right = self.reduction in ("mean", "max") and self.power in (1, 2) and self.distance >= 0 and self.stride >= 1
        self.check(right, "reduction must be mean or max, power 1 or 2, distance at least 0, stride at least 1")

    @override
    @property
    def sample(self) -> Sample:
        return Sample(stride=self.stride)

    @override
    @property
    def attention_power(self) -> float:
        return self.power

    @override
    def score(self, seen: Observation) -> Float[Tensor, "batch heads entries"]:
        before = self._queries(seen.first_query - seen.stride, seen)
        after = self._queries(seen.last_query, seen)
        return (seen.previous * before + self._received(seen)) / after.clamp(min=1)

    def _queries(self, last: Tensor, seen: Observation) -> Tensor:
        """How many of the queries up to `last` count for each entry."""
        since = last - seen.key_positions
        if self.distance:
            since = since - self.distance
        if seen.stride > 1:
            since = since.div(seen.stride, rounding_mode="floor")
        return (since + 1).clamp(min=0)

    def _received(self, seen: Observation) -> Float[Tensor, "batch heads entries"]:
        attention = seen.over_group(self.reduction).float()  # the square of 1/5000 is nothing in float16
        attention = attention if self.power == 1 else attention.square()
        if self.distance:
            apart = seen.query_positions[:, None, :, None] - seen.key_positions[:, :, None, :]
            attention = torch.where(apart >= self.distance, attention, 0)
        return attention.sum(2)
