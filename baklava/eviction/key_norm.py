"""Key norm: the entries with small keys stay."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from baklava.eviction.base import Eviction, Observation, QuerySample


@dataclass(frozen=True)
class KeyNorm(Eviction):
    """Keep the entries whose keys have the smallest L2 norm, which tend to be attended to (arXiv 2406.11430).

    Cost: a norm per entry at each eviction; no queries are observed, in decoding either.
    """

    name: ClassVar[str] = "key_norm"

    @override
    @property
    def query_sample(self) -> QuerySample:
        return QuerySample(window=0)

    @override
    def score(self, observation: Observation) -> Float[Tensor, "batch heads entries"]:
        return -observation.key.float().norm(dim=-1)
