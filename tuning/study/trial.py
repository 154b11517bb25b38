"""Records of ended trials, and the metrics that their scores add up to."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from baklava.serialization import FrozenModel
from tuning.study.objective import Goal, Metrics

TRIALS_FILE = "trials.jsonl"

TrialStatus = Literal["finished", "pruned", "failed"]
WINDOW_METRICS = ("nll_full", "nll", "dnll", "kl", "allocated_bytes", "seconds")

DECODE_SECONDS = "decode_seconds"
"""Metric: seconds of one decode step, measured only for a front with latency."""

GRACE_WINDOWS = 2
"""Windows that every trial is scored on: documents differ too much to stop a trial after one."""

MIN_KL = 1e-6
"""KL in nats per token below which it is rounding: that of a cache that stores everything in 16 bits."""


class TrialRecord(FrozenModel):
    """An ended trial: every window scored ("finished"), stopped early ("pruned"), or failed with `error`.

    `metrics` are means over the scored windows (nats per token; bytes per sequence) and the plan's size. `windows` are
    their scores, in the order of scoring. `digest` is the plan's, None for a failed trial and in journals of older
    versions. `twin` is an earlier trial with the same plan, whose scores these are.
    """

    trial: int
    params: dict[str, Any]
    metrics: dict[str, float]
    status: TrialStatus
    windows: tuple[dict[str, Any], ...] = ()
    error: str | None = None
    digest: str | None = None
    twin: int | None = None

    @property
    def parent_trial(self) -> int | None:
        """The number of the trial that the local search refined into this one; None if a sampler drew it."""
        return self.params.get("base")

    def metrics_after(self, windows: int) -> Metrics:
        """Return the metrics that it had after its first `windows` windows."""
        size: Metrics = {name: self.metrics[name] for name in ("ratio", "bytes_per_sequence") if name in self.metrics}
        return {**mean_metrics(self.windows[:windows]), **size}


def mean_metrics(scores: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the mean of every metric over the scored windows; perplexity comes from the mean NLL.

    `kl_geometric` is the geometric mean of the windows' KL. Windows differ in KL by ten times and more (verbatim
    repetition against prose), so that the plain mean reflects only the worst one. In the geometric mean, a plan that
    loses a tenth less on every window gains a tenth.
    """
    metrics = {name: fmean(score[name] for score in scores) for name in WINDOW_METRICS}
    metrics["seconds"] = sum(score["seconds"] for score in scores)
    metrics["allocated_bytes"] = max(score["allocated_bytes"] for score in scores)
    metrics["kl_geometric"] = geometric_mean([score["kl"] for score in scores])
    if all(DECODE_SECONDS in score for score in scores):
        metrics[DECODE_SECONDS] = fmean(score[DECODE_SECONDS] for score in scores)
    return {**metrics, "ppl": perplexity(metrics["nll"]), "ppl_full": perplexity(metrics["nll_full"])}


def non_finite_reason(score: Mapping[str, Any]) -> str | None:
    """Return which number of a window's score is not finite, in words; None if all are."""
    wrong = [name for name, value in score.items() if isinstance(value, float) and not math.isfinite(value)]
    return f"{wrong[0]} is {score[wrong[0]]} on window {score.get('window')}" if wrong else None


def reported_metrics(result: Mapping[str, Any]) -> Metrics:
    """Return the metrics in a report to Tune, which renames nested numbers before searchers and schedulers see them."""
    return {**mean_metrics(result["windows"]), "ratio": result["ratio"]}


def geometric_mean(kls: Sequence[float]) -> float:
    """Return the geometric mean of KLs, each at least `MIN_KL`."""
    return math.exp(fmean(math.log(max(kl, MIN_KL)) for kl in kls))


def perplexity(nll: float) -> float:
    """Return exp(NLL), capped before it overflows, since JSON has no infinity."""
    return math.exp(min(nll, 700.0))


def finished_trials(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return the trials that scored every window."""
    return [record for record in records if record.status == "finished"]


def best_trials(records: Iterable[TrialRecord], goal: Goal, count: int = 1) -> list[TrialRecord]:
    """Return the `count` best trials that scored every window, the best first; of equal ones, the earlier wins."""
    return sorted(finished_trials(records), key=lambda record: goal.objective_value(record.metrics))[:count]
