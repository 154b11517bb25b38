"""KVzip: the entries that the model needs to repeat the prompt stay."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from baklava.eviction.base import Eviction, Observation, QuerySample


@dataclass(frozen=True)
class KVzip(Eviction):
    """Keep the entries with the largest attention from any query while the model repeats the prompt (2505.23416).

    The score is the maximum over the repeating queries and the query group. In decoding, and in later turns, the
    attention received raises it.

    Cost: about one more prefill, over the full cache, which stays in memory until it is compressed; see
    `baklava.runtime.prefill`.
    """

    name: ClassVar[str] = "kvzip"

    @override
    @property
    def query_sample(self) -> QuerySample:
        return QuerySample(uses_repetition=True)

    @override
    def score(self, observation: Observation) -> Float[Tensor, "batch heads entries"]:
        return torch.maximum(observation.previous_scores, observation.reduce_group("max").amax(2))
