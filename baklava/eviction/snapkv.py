"""SnapKV: the entries that the end of the prompt attends to stay."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from baklava.eviction.base import Eviction, Observation, QuerySample


@dataclass(frozen=True)
class SnapKV(Eviction):
    """Keep the entries that an observation window of the newest queries attends to most (SnapKV, arXiv 2404.14469).

    The weight of a query falls exponentially over about `window` tokens. Decoding continues the average token by token
    without storing queries; the paper's window has a hard edge. `reduction` reduces the query group; `pooling` keeps
    the neighbours of attended entries.

    Cost: the attention probabilities of the last 4 x `window` queries of a prompt.
    """

    name: ClassVar[str] = "snapkv"

    pooling: int = 5
    window: int = 16
    reduction: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        is_valid = self.window >= 1 and self.reduction in ("mean", "max")
        self.require(is_valid, "window must be at least 1, reduction mean or max")

    @override
    @property
    def query_sample(self) -> QuerySample:
        return QuerySample(window=4 * self.window)

    @override
    def score(self, observation: Observation) -> Float[Tensor, "batch heads entries"]:
        attention = observation.reduce_group(self.reduction)
        return exponential_moving_average(observation.previous_scores, attention, self.window)


def exponential_moving_average(
    previous: Float[Tensor, "batch heads entries"], values: Float[Tensor, "batch heads queries entries"], window: int
) -> Float[Tensor, "batch heads entries"]:
    """Return the average over queries, weighted by (1 - 1/window)^age and continued from `previous`."""
    decay, queries = 1 - 1 / window, values.shape[2]
    ages = torch.arange(queries - 1, -1, -1, device=values.device, dtype=torch.float32)
    weights = torch.full_like(ages, decay).pow(ages) / window
    return previous * decay**queries + (values.float() * weights[:, None]).sum(2)
