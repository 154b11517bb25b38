"""The trial: a light function that has a plan made of its parameters, and scored window by window.

It loads no model, and not even torch: plans are made in the pool, scores in the replicas, so a trial's process costs
next to nothing and starts at once.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray import tune

from tuning.study.objective import Goal
from tuning.study.trial import DECODING, GRACE_WINDOWS, means, not_finite

WORST = 1e9
"""Reported by a failed trial, since every report must carry the objective; the searcher never sees it."""


def trial(params: dict[str, Any], *, pool: Any, windows: Sequence[str], goal: Goal, ahead: int = 1) -> None:
    """Score the plan of `params` on the windows, reporting the running means after each.

    All trials see the windows in the same order, so running means compare at every step; `ahead` of them are under way
    at once, for different replicas. A plan that cannot be made or scored ends the trial with its reason.
    """
    plan, scores = ray.get(pool.plan.remote(params)), []
    if "error" in plan:
        return _fail(plan["error"])
    for score in _in_order(pool, plan["json"], windows, ahead):
        reason = score.get("error") or not_finite(score)
        if reason:
            return _fail(reason)
        scores.append(score)
        metrics = {**means(scores), **plan["size"]}
        numbers = {"objective": goal.value(metrics), "ratio": metrics["ratio"], DECODING: metrics.get(DECODING)}
        tune.report({**numbers, "metrics": metrics, "windows": scores})


def _in_order(pool: Any, plan: str, windows: Sequence[str], ahead: int) -> Iterator[dict[str, Any]]:
    sent: list[Any] = []
    for step in range(len(windows)):
        # Nothing is decided within the grace, so what is sent there is never for nothing.
        until = max(GRACE_WINDOWS, step + ahead)
        sent += [pool.score.remote(plan, window) for window in windows[len(sent) : until]]
        yield ray.get(sent[step])


def _fail(reason: str) -> None:
    # Raising would have Tune start the trial again, as it should when a node dies under it and only then.
    tune.report({"objective": WORST, "ratio": WORST, DECODING: WORST, "failed": reason})
