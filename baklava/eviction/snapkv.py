"""SnapKV: what the end of the prompt attends to stays."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from baklava.eviction.base import Eviction, Observation, Sample


@dataclass(frozen=True)
class SnapKV(Eviction):
    """Keep the entries to which an observation window of newest queries attends most (SnapKV, arXiv 2404.14469).

    A query's weight falls off exponentially over `window` tokens, which goes on in decoding token by token and needs
    no queries kept; the paper's window has an edge. `reduction` joins the query group; `pooling` keeps the neighbours
    of what is attended to. Cost: the probabilities of the last 4 x `window` queries of a prompt.
    """

    name: ClassVar[str] = "snapkv"

    pooling: int = 5
    window: int = 16
    reduction: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        right = self.window >= 1 and self.reduction in ("mean", "max")
        self.check(right, "window must be at least 1, reduction mean or max")

    @override
    @property
    def sample(self) -> Sample:
        return Sample(window=4 * self.window)

    @override
    def score(self, seen: Observation) -> Float[Tensor, "batch heads entries"]:
        return fading(seen.previous, seen.over_group(self.reduction), self.window)


def fading(
    previous: Float[Tensor, "batch heads entries"], received: Float[Tensor, "batch heads queries entries"], window: int
) -> Float[Tensor, "batch heads entries"]:
    """Mean over queries whose weight falls by 1 - 1/window per newer query, continued from `previous`."""
    kept, queries = 1 - 1 / window, received.shape[2]
    ages = torch.arange(queries - 1, -1, -1, device=received.device, dtype=torch.float32)
    weights = torch.full_like(ages, kept).pow(ages) / window
    return previous * kept**queries + (received.float() * weights[:, None]).sum(2)
