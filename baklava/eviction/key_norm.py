"""Key norm: small keys stay."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from baklava.eviction.base import Eviction, Observation, Sample


@dataclass(frozen=True)
class KeyNorm(Eviction):
    """Keep the entries whose keys have the smallest L2 norm, which tend to be attended to (arXiv 2406.11430).

    Cost: a norm per entry at each eviction; no queries are observed, in decoding neither.
    """

    name: ClassVar[str] = "key_norm"

    @override
    @property
    def sample(self) -> Sample:
        return Sample(window=0)

    @override
    def score(self, seen: Observation) -> Float[Tensor, "batch heads entries"]:
        return -seen.key.float().norm(dim=-1)
