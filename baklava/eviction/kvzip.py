"""Context reconstruction: what the model needs to repeat the prompt stays."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from baklava.eviction.base import Eviction, Observation, Sample


@dataclass(frozen=True)
class Reconstruction(Eviction):
    """Keep the entries that get most attention from any query while the model repeats the prompt (KVzip, 2505.23416).

    The score is the largest probability over the repeating queries and the query group. In decoding, and in later
    turns, the attention really received raises it.

    Cost: about one more prefill, over the full cache, which lives until the cut; `baklava.runtime.prefill` does it.
    """

    name: ClassVar[str] = "reconstruction"

    @override
    @property
    def sample(self) -> Sample:
        return Sample(repeated=True)

    @override
    def score(self, seen: Observation) -> Float[Tensor, "batch heads entries"]:
        return torch.maximum(seen.previous, seen.over_group("max").amax(2))
