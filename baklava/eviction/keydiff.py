"""KeyDiff: keys unlike the others stay."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from typing_extensions import override

from baklava.eviction.base import Eviction, Observation, Sample


@dataclass(frozen=True)
class KeyDiff(Eviction):
    """Keep the entries whose keys point away from the mean direction of all keys held (KeyDiff, arXiv 2504.15364).

    Cost: two passes over the keys at each eviction; no queries are observed, in decoding neither.
    """

    name: ClassVar[str] = "keydiff"

    @override
    @property
    def sample(self) -> Sample:
        return Sample(window=0)

    @override
    def score(self, seen: Observation) -> Float[Tensor, "batch heads entries"]:
        real = (seen.key_positions >= 0)[..., None]
        direction = (normalize(seen.key.float(), dim=-1) * real).sum(2, keepdim=True)
        return -cosine_similarity(seen.key.float(), direction, dim=-1)
