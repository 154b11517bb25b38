"""The goal of a search: what it minimises, and under which constraint."""

from typing import Annotated, Literal

from pydantic import Field

from baklava.evaluation.intervals import format_share
from baklava.serialization import FrozenModel

Objective = Literal["kl", "ppl"]
Metrics = dict[str, float]

LOSS_METRICS: dict[Objective, str] = {"kl": "kl_geometric", "ppl": "ppl"}
"""The metric that each objective minimises."""

LOSS_NAMES: dict[Objective, str] = {"kl": "KL", "ppl": "perplexity"}


class Goal(FrozenModel):
    """One of three: the best plan of size `budget`, the smallest within `max_dnll`, or a Pareto front of size and loss.

    `budget` is a share of the 16-bit full cache's bytes; with `front` it only chooses the point that becomes the plan.
    `max_dnll` is in nats per token above the full cache. With `latency`, the front also minimises the decode time.
    """

    objective: Objective = "kl"
    budget: Annotated[float, Field(gt=0, le=1)] | None = None
    max_dnll: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    front: bool = False
    latency: bool = False

    @property
    def samples_budget(self) -> bool:
        """Whether every trial samples its own size."""
        return self.front or self.max_dnll is not None

    @property
    def description(self) -> str:
        """What the search looks for, in words."""
        if self.front:
            return f"every size, for a front of {'bytes, loss and latency' if self.latency else 'bytes and loss'}"
        if self.max_dnll is not None:
            return f"the smallest size that loses at most {self.max_dnll:g} nats per token"
        return f"{format_share(self.budget or 0, 4)} of the bytes"

    def is_feasible(self, metrics: Metrics) -> bool:
        """Return whether a plan with these metrics stays within `max_dnll`."""
        return self.max_dnll is None or metrics["dnll"] <= self.max_dnll

    def loss(self, metrics: Metrics) -> float:
        """Return the loss by which plans of one size compare."""
        return metrics[LOSS_METRICS[self.objective] if self.max_dnll is None else "dnll"]

    @property
    def loss_name(self) -> str:
        """The name of the loss."""
        return LOSS_NAMES[self.objective] if self.max_dnll is None else "dNLL"

    @property
    def value_name(self) -> str:
        """The name of `objective_value`."""
        return "size" if self.max_dnll is not None else self.loss_name

    def objective_value(self, metrics: Metrics) -> float:
        """Return the number that the search minimises.

        With `max_dnll` it is the share of bytes of a feasible plan, and 1 + the excess in nats of an infeasible one.
        """
        if self.max_dnll is None:
            return self.loss(metrics)
        return metrics["ratio"] if self.is_feasible(metrics) else 1 + metrics["dnll"] - self.max_dnll

    def pareto_values(self, metrics: Metrics) -> tuple[float, ...]:
        """Return what a front minimises: share of bytes, loss, and with `latency` seconds per decode step."""
        return (metrics["ratio"], self.loss(metrics), *([metrics["decode_seconds"]] if self.latency else []))

    def format_metrics(self, metrics: Metrics) -> str:
        """Return the quality of a plan with these metrics, in words."""
        if self.max_dnll is not None:
            return f"{format_share(metrics['ratio'])} of the bytes at {metrics['dnll']:+.4f} nats per token"
        size = f" at {format_share(metrics['ratio'])} of the bytes" if self.front else ""
        time = f", {1e3 * metrics['decode_seconds']:.3g} ms a token" if self.latency else ""
        return f"{LOSS_NAMES[self.objective]} {self.loss(metrics):.4g}{size}{time}"
