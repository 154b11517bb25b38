"""Heavy hitters: what has been attended to stays."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from baklava.errors import UserError
from baklava.eviction.base import Eviction, Observation


@dataclass(frozen=True)
class HeavyHitter(Eviction):
    """Keep the entries that received most attention, as a mean over the queries that saw them (H2O, arXiv 2306.14048).

    `reduction` joins the query group of a KV head; `power` 1 is the mean, 2 ranks by the mean square; only queries at
    least `distance` tokens after an entry count, since near tokens attend to each other anyway. The mean is a running
    one, so decoding goes on where the prompt ended.
    """

    name: ClassVar[str] = "heavy_hitter"

    reduction: Literal["mean", "max"] = "mean"
    power: Literal[1, 2] = 1
    distance: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction not in ("mean", "max") or self.power not in (1, 2) or self.distance < 0:
            raise UserError(
                f"heavy_hitter with reduction {self.reduction!r}, power {self.power}, distance {self.distance}: "
                "reduction must be mean or max, power 1 or 2, distance at least 0"
            )

    @override
    def score(self, seen: Observation) -> Float[Tensor, "batch heads entries"]:
        before = (seen.first_query - seen.key_positions - self.distance).clamp(min=0)
        after = (seen.last_query + 1 - seen.key_positions - self.distance).clamp(min=0)
        return (seen.previous * before + self._received(seen)) / after.clamp(min=1)

    def _received(self, seen: Observation) -> Float[Tensor, "batch heads entries"]:
        attention = seen.over_group(self.reduction)
        attention = attention if self.power == 1 else attention.square()
        if self.distance:
            apart = seen.query_positions[:, None, :, None] - seen.key_positions[:, :, None, :]
            attention = torch.where(apart >= self.distance, attention, 0)
        return attention.sum(2)
