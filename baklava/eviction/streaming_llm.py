"""Sinks + recent window."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from baklava.errors import UserError
from baklava.eviction.base import Eviction, Observation, Sample


@dataclass(frozen=True)
class Streaming(Eviction):
    """Keep the first `sinks` tokens and the newest ones (StreamingLLM, arXiv 2309.17453).

    The score is the position itself, so a head is a ring and needs neither scores nor slack. Cost: none.
    """

    name: ClassVar[str] = "streaming"
    scored: ClassVar[bool] = False

    recent: float = 1.0
    interval: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.recent, self.interval, self.pooling, self.staged, self.centroids) != (1.0, 1, 1, False, 0):
            raise UserError(
                f"streaming with recent {self.recent}, interval {self.interval}, pooling {self.pooling}, staged "
                f"{self.staged}, centroids {self.centroids}: a ring keeps the newest tokens, one by one; leave its "
                "knobs alone"
            )

    @override
    @property
    def sample(self) -> Sample:
        return Sample(window=0)

    @override
    def score(self, seen: Observation) -> Float[Tensor, "batch heads entries"]:
        return seen.key_positions.to(seen.previous.dtype).expand_as(seen.previous)
