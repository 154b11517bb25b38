"""TOVA: what the last token attends to stays."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from baklava.eviction.base import Eviction, Observation, Sample


@dataclass(frozen=True)
class Tova(Eviction):
    """Keep the entries to which the newest query attends most (TOVA, arXiv 2401.06104).

    `reduction` joins the query group. The paper averages over all heads of a layer; here each KV head decides for
    itself. In decoding the newest token's attention replaces the scores. Cost: one query's probabilities per prompt.
    """

    name: ClassVar[str] = "tova"

    reduction: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.reduction in ("mean", "max"), "reduction must be mean or max")

    @override
    @property
    def sample(self) -> Sample:
        return Sample(window=1)

    @override
    def score(self, seen: Observation) -> Float[Tensor, "batch heads entries"]:
        return seen.over_group(self.reduction)[:, :, -1]
