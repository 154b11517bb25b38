"""The goal of a search: what it lowers, and inside which bound."""

from typing import Annotated, Literal

from pydantic import Field

from baklava.evaluation.formatting import share
from baklava.serialization import FrozenModel

Objective = Literal["kl", "ppl"]
Metrics = dict[str, float]

LOWERED = {"kl": "kl_geometric", "ppl": "ppl"}
"""The metric that each objective lowers."""

NAMES = {"kl": "KL", "ppl": "perplexity"}


class Goal(FrozenModel):
    """One of three: the best plan inside `budget`, the smallest that keeps to `max_dnll`, or a front of size and loss.

    `budget` is a share of the 16-bit full cache's bytes; with `front` it only says which point becomes the plan.
    `max_dnll` is in nats per token above the full cache. With `latency` a front lowers the time of decoding, too.
    """

    objective: Objective = "kl"
    budget: Annotated[float, Field(gt=0, le=1)] | None = None
    max_dnll: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    front: bool = False
    latency: bool = False

    @property
    def draws_budget(self) -> bool:
        """Whether every trial draws its own size."""
        return self.front or self.max_dnll is not None

    @property
    def asked(self) -> str:
        """What is looked for, in words."""
        if self.front:
            return f"every size, for a front of {'bytes, loss and latency' if self.latency else 'bytes and loss'}"
        if self.max_dnll is not None:
            return f"the smallest size that loses at most {self.max_dnll:g} nats per token"
        return f"{share(self.budget or 0, 4)} of the bytes"

    def keeps(self, metrics: Metrics) -> bool:
        """Whether a plan with these metrics loses no more than it may."""
        return self.max_dnll is None or metrics["dnll"] <= self.max_dnll

    def loss(self, metrics: Metrics) -> float:
        """What a plan of its size should lower."""
        return metrics[LOWERED[self.objective] if self.max_dnll is None else "dnll"]

    @property
    def loss_name(self) -> str:
        """What the loss is called."""
        return NAMES[self.objective] if self.max_dnll is None else "dNLL"

    @property
    def value_name(self) -> str:
        """What the number is called that the search lowers."""
        return "size" if self.max_dnll is not None else self.loss_name

    def value(self, metrics: Metrics) -> float:
        """The number that the search lowers.

        Under a bound it is the share of bytes of plans that keep it, and 1 + the excess in nats of those that do not.
        """
        if self.max_dnll is None:
            return self.loss(metrics)
        return metrics["ratio"] if self.keeps(metrics) else 1 + metrics["dnll"] - self.max_dnll

    def axes(self, metrics: Metrics) -> tuple[float, ...]:
        """The numbers that a front lowers: share of bytes, loss, and seconds of a decoding step where asked for."""
        return (metrics["ratio"], self.loss(metrics), *([metrics["decode_seconds"]] if self.latency else []))

    def told(self, metrics: Metrics) -> str:
        """How good a plan with these metrics is, in words."""
        if self.max_dnll is not None:
            return f"{share(metrics['ratio'])} of the bytes at {metrics['dnll']:+.4f} nats per token"
        size = f" at {share(metrics['ratio'])} of the bytes" if self.front else ""
        time = f", {1e3 * metrics['decode_seconds']:.3g} ms a token" if self.latency else ""
        return f"{NAMES[self.objective]} {self.loss(metrics):.4g}{size}{time}"
