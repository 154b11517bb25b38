"""TOVA: the entries that the last token attends to stay."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from baklava.eviction.base import Eviction, Observation, QuerySample


@dataclass(frozen=True)
class TOVA(Eviction):
    """Keep the entries that the newest query attends to most (TOVA, arXiv 2401.06104).

    `reduction` reduces the query group. The paper averages over all heads of a layer; here each KV head decides for
    itself. In decoding, the newest token's attention replaces the scores.

    Cost: the attention probabilities of one query per prompt.
    """

    name: ClassVar[str] = "tova"

    reduction: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.reduction in ("mean", "max"), "reduction must be mean or max")

    @override
    @property
    def query_sample(self) -> QuerySample:
        return QuerySample(window=1)

    @override
    def score(self, observation: Observation) -> Float[Tensor, "batch heads entries"]:
        return observation.reduce_group(self.reduction)[:, :, -1]
