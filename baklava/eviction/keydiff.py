"""KeyDiff: the entries whose keys differ from the others stay."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from typing_extensions import override

from baklava.eviction.base import Eviction, Observation, QuerySample


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
