"""StreamingLLM: sinks and a recent window stay."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from baklava.errors import UserError
from baklava.eviction.base import Eviction, Observation, QuerySample


@dataclass(frozen=True)
class StreamingLLM(Eviction):
    """Keep the first `sinks` tokens and the newest ones (StreamingLLM, arXiv 2309.17453).

    The score is the position itself, so a head is a ring buffer and needs neither scores nor an eviction interval.
    Cost: none.
    """

    name: ClassVar[str] = "streaming_llm"
    scored: ClassVar[bool] = False

    recent_ratio: float = 1.0
    eviction_interval: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        fixed = (self.recent_ratio, self.eviction_interval, self.pooling, self.full_precision_recent, self.centroids)
        if fixed != (1.0, 1, 1, False, 0):
            raise UserError(
                f"{self.name} with recent_ratio {self.recent_ratio}, eviction_interval {self.eviction_interval}, "
                f"pooling {self.pooling}, full_precision_recent {self.full_precision_recent}, centroids "
                f"{self.centroids}: a ring buffer replaces its oldest token by the newest; set sinks only"
            )

    @override
    @property
    def query_sample(self) -> QuerySample:
        return QuerySample(window=0)

    @override
    def score(self, observation: Observation) -> Float[Tensor, "batch heads entries"]:
        previous = observation.previous_scores
        return observation.key_positions.to(previous.dtype).expand_as(previous)
