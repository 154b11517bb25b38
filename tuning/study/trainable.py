"""The function that Ray Tune runs per trial: it requests the plan and its scores, window by window.

It loads no model, and not even torch: the scheduler makes the plans and the workers score them, so that a trial's
process costs next to nothing and starts at once.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray import tune

from tuning.study.objective import Goal
from tuning.study.trial import DECODE_SECONDS, GRACE_WINDOWS, mean_metrics, non_finite_reason

FAILED_OBJECTIVE = 1e9
"""Reported by a failed trial, since every report must carry the objective; the searcher never sees it."""


def trainable(params: dict[str, Any], *, scheduler: Any, windows: Sequence[str], goal: Goal, prefetch: int = 1) -> None:
    """Score the plan of `params` on the windows, and report the running means after each.

    All trials see the windows in the same order, so that running means compare at every step. A plan that cannot be
    made or scored ends the trial with its reason.

    Args:
        params: What the searcher proposed.
        scheduler: The actor handle of the `WorkerScheduler`.
        windows: Names of the windows.
        goal: What the search minimises.
        prefetch: Windows that are scored at once, by different workers.
    """
    plan = ray.get(scheduler.plan.remote(params))
    if "error" in plan:
        return report_failure(plan["error"])
    scores: list[dict[str, Any]] = []
    for score in _score_in_order(scheduler, plan["json"], windows, prefetch):
        reason = score.get("error") or non_finite_reason(score)
        if reason:
            return report_failure(reason)
        scores.append(score)
        metrics = {**mean_metrics(scores), **plan["size"]}
        minimised = {
            "objective": goal.objective_value(metrics),
            "ratio": metrics["ratio"],
            DECODE_SECONDS: metrics.get(DECODE_SECONDS),
        }
        tune.report({**minimised, "metrics": metrics, "windows": scores})


def report_failure(reason: str) -> None:
    """End the trial; an exception would make Tune start it again, which is right only if its node died."""
    failed = dict.fromkeys(("objective", "ratio", DECODE_SECONDS), FAILED_OBJECTIVE)
    tune.report({**failed, "failed": reason})


def _score_in_order(scheduler: Any, plan: str, windows: Sequence[str], prefetch: int) -> Iterator[dict[str, Any]]:
    sent: list[Any] = []
    for step in range(len(windows)):
        # No trial is stopped during the grace period, so none of these scores is wasted.
        until = max(GRACE_WINDOWS, step + prefetch)
        sent += [scheduler.score.remote(plan, window) for window in windows[len(sent) : until]]
        yield ray.get(sent[step])
