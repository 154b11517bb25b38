"""Eviction without attention: the position or the key of an entry decides, and no queries are observed.

- `StreamingLLM`: sinks and a recent window stay.
- `KeyNorm`: the entries with small keys stay.
- `KeyDiff`: the entries whose keys differ from the others stay.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
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
        fixed = {
            "recent_ratio": 1.0,
            "eviction_interval": 1,
            "pooling": 1,
            "residual_length": 0,
            "fit_references": 0,
            "centroids": 0,
        }
        if any(getattr(self, name) != value for name, value in fixed.items()):
            found = ", ".join(f"{name} {getattr(self, name)}" for name in fixed)
            raise UserError(
                f"{self.name} with {found}: a ring buffer replaces its oldest token by the newest; set sinks only"
            )

    @override
    @property
    def query_sample(self) -> QuerySample:
        return QuerySample(window=0)

    @override
    def score(self, observation: Observation) -> Float[Tensor, "batch heads entries"]:
        previous = observation.previous_scores
        return observation.key_positions.to(previous.dtype).expand_as(previous)


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


@dataclass(frozen=True)
class KeyDiff(Eviction):
    """Keep the entries whose keys point away from the mean direction of all cached keys (KeyDiff, arXiv 2504.15364).

    Cost: two passes over the keys at each eviction; no queries are observed, in decoding either.
    """

    name: ClassVar[str] = "keydiff"

    @override
    @property
    def query_sample(self) -> QuerySample:
        return QuerySample(window=0)

    @override
    def score(self, observation: Observation) -> Float[Tensor, "batch heads entries"]:
        is_real = (observation.key_positions >= 0)[..., None]
        direction = (normalize(observation.key.float(), dim=-1) * is_real).sum(2, keepdim=True)
        return -cosine_similarity(observation.key.float(), direction, dim=-1)
