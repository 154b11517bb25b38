"""Trials that ended, and what their scores come to."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from baklava.serialization import FrozenModel
from tuning.study.objective import Goal, Metrics

FILE = "trials.jsonl"

Status = Literal["finished", "pruned", "failed"]
WINDOW_METRICS = ("nll_full", "nll", "dnll", "kl", "allocated_bytes", "seconds")

DECODING = "decode_seconds"
"""Seconds of one decoding step, measured only where a front of latency is asked for."""

GRACE_WINDOWS = 2
"""Windows that every trial is scored on: the spread between documents makes one window too few to stop on."""

LEAST_KL = 1e-6
"""Nats per token below which a KL is rounding: what a cache that keeps everything in 16 bits shows."""


class TrialRecord(FrozenModel):
    """A trial that ended: every window scored, stopped early ("pruned"), or failed with the reason in `error`.

    `metrics` are means over the scored windows (nats per token; bytes per sequence) and the plan's size; `windows` are
    the scores they come from, in the order of scoring. `twin` is an earlier trial with the same plan, whose scores they
    are.
    """

    trial: int
    params: dict[str, Any]
    metrics: dict[str, float]
    status: Status
    windows: tuple[dict[str, Any], ...] = ()
    error: str | None = None
    twin: int | None = None

    @property
    def refines(self) -> int | None:
        """Number of the trial that this one started from; None where it was drawn."""
        return self.params.get("base")

    def after(self, windows: int) -> Metrics:
        """The metrics that it had after that many windows."""
        size: Metrics = {name: self.metrics[name] for name in ("ratio", "bytes_per_sequence") if name in self.metrics}
        return {**means(self.windows[:windows]), **size}


def means(scores: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean of every metric over the windows scored so far; perplexity from the mean NLL.

    `kl_geometric` is the geometric mean of the windows' KL. Windows differ in KL by ten times and more (text that
    repeats itself to the letter against prose), so the plain mean is the opinion of the worst one; in the geometric
    mean a plan that loses a tenth less on every window gains a tenth.
    """
    mean = {metric: fmean(score[metric] for score in scores) for metric in WINDOW_METRICS}
    mean["seconds"] = sum(score["seconds"] for score in scores)
    mean["allocated_bytes"] = max(score["allocated_bytes"] for score in scores)
    mean["kl_geometric"] = geometric_mean([score["kl"] for score in scores])
    if all(DECODING in score for score in scores):
        mean[DECODING] = fmean(score[DECODING] for score in scores)
    return {**mean, "ppl": perplexity(mean["nll"]), "ppl_full": perplexity(mean["nll_full"])}


def not_finite(score: Mapping[str, Any]) -> str | None:
    """What of a window's score is no number, in words; None where all is."""
    wrong = [name for name, value in score.items() if isinstance(value, float) and not math.isfinite(value)]
    return f"{wrong[0]} is {score[wrong[0]]} on window {score.get('window')}" if wrong else None


def reported(result: Mapping[str, Any]) -> Metrics:
    """The metrics behind a report to Tune, which hands nested numbers to searchers and schedulers under other names."""
    return {**means(result["windows"]), "ratio": result["ratio"]}


def geometric_mean(kls: Sequence[float]) -> float:
    """Geometric mean of KLs, each at least `LEAST_KL`."""
    return math.exp(fmean(math.log(max(kl, LEAST_KL)) for kl in kls))


def perplexity(nll: float) -> float:
    """exp(NLL), held back where it would overflow, since JSON has no infinity."""
    return math.exp(min(nll, 700.0))


def finished(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """The trials that scored every window."""
    return [record for record in records if record.status == "finished"]


def best_of(records: Iterable[TrialRecord], goal: Goal, count: int = 1) -> list[TrialRecord]:
    """The `count` best trials that scored every window; the first of equals wins."""
    return sorted(finished(records), key=lambda record: goal.value(record.metrics))[:count]
