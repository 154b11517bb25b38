"""LocalSearch: the last trials start from the best so far and let layers and heads trade bytes, on measured gain only.

An evolution strategy of one parent and one child: a step in a direction, the step back if that did not help, the same
step again if it did. All that it decides by is in the records, so that a resumed search goes on as it would have.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from baklava.plan.geometry import CacheGeometry
from tuning.optimizers.pareto import non_dominated
from tuning.study.interrupt import StopFlag
from tuning.study.journal import Journal
from tuning.study.search_space import Params, SearchTask
from tuning.study.trial import TrialRecord, best_trials, finished_trials, reported_metrics

INITIAL_STEP, MIN_STEP, MAX_STEP = 0.4, 0.05, 1.5
"""Root mean square of the shifts of one step, in powers of two: the first one moves a head by a third."""

GROWN, SHRUNK = 1.5, 0.85
"""What a step that helped and one that did not make of the next one: steady at two successes in seven."""

WAVES = 4
"""Cosines over depth that a broad direction is made of."""

SAVING = 0.1
"""Powers of two per step, where the goal is the least bytes: budgets fall where the bound is kept, and else grow."""

Shifts = Float[np.ndarray, "layers kv_heads"]


class LocalSearch(Searcher):
    """Proposes refinements of the best finished trial, or of the trials of the front in turn."""

    def __init__(self, task: SearchTask, seed: int, journal: Journal[TrialRecord], stop: StopFlag) -> None:
        super().__init__(metric="objective", mode="min")
        self.task, self.seed, self.journal, self.stop = task, seed, journal, stop
        self.proposed = [record.params for record in journal.records if record.parent_trial]

    def suggest(self, trial_id: str) -> Params | str | None:
        """Parameters of the next refinement, unless the search was asked to stop."""
        if self.stop.requested:
            return Searcher.FINISHED
        self.proposed.append(propose(self.task, self.seed, self.journal.records, self.proposed))
        return self.proposed[-1]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the journal has it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing, for the same reason."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, for the same reason."""


class PairedPruner(FIFOScheduler):
    """Stops a refinement that is behind the trial that it started from halfway through the windows, or later."""

    def __init__(self, task: SearchTask, journal: Journal[TrialRecord]) -> None:
        super().__init__()
        self.task, self.journal = task, journal

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
        step, windows = len(result.get("windows", ())), len(self.task.windows)
        if "failed" in result or not (windows + 1) // 2 <= step < windows:
            return TrialScheduler.CONTINUE
        base = self.journal.records[trial.config["base"] - 1]
        behind = self._expected(base, reported_metrics(result), step) > self.task.goal.objective_value(base.metrics)
        return TrialScheduler.STOP if behind else TrialScheduler.CONTINUE

    def _expected(self, base: TrialRecord, metrics: dict[str, float], step: int) -> float:
        """The objective over all windows, if the others treat both trials as those up to here did."""
        so_far, in_the_end = base.metrics_after(step), base.metrics
        ahead = {name: in_the_end[name] + metrics[name] - so_far[name] for name in ("dnll", "ppl")}
        geometric = in_the_end["kl_geometric"] * metrics["kl_geometric"] / so_far["kl_geometric"]
        return self.task.goal.objective_value({**metrics, **ahead, "kl_geometric": geometric})


def propose(task: SearchTask, seed: int, records: Sequence[TrialRecord], proposed: Sequence[Params]) -> Params:
    """The next refinement, after `records` ended and all of `proposed` were begun; some trial must have finished."""
    base, step = _base(task, records, len(proposed)), step_size(task, records)
    direction = _direction(base, proposed)
    shifts = _shifts(base, task.profile.geometry) + step * direction_vector(direction, seed, task.profile.geometry)
    moved = {"shifts": np.round(shifts, 3).tolist(), "base": base.trial, "direction": direction, "step": step}
    if task.goal.max_dnll is not None:
        way, (least, most) = -1 if task.goal.is_feasible(base.metrics) else 1, task.space.sizes or (0.0, 1.0)
        moved["budget"] = min(most, max(least, base.params["budget"] * 2 ** (way * SAVING * step)))
    return {**base.params, **moved}


def direction_vector(direction: int, seed: int, geometry: CacheGeometry) -> Shifts:
    """Shifts of root mean square 1: smooth over depth in odd directions, of every head by itself in even ones.

    Directions count from 1; the negative of one is the way back.
    """
    layers, heads = len(geometry.budgetable), geometry.kv_heads
    source = np.random.default_rng([seed, abs(direction)])
    if direction % 2:
        depth = np.pi * (np.arange(layers) + 0.5) / layers
        waves = np.cos(np.arange(1, WAVES + 1)[:, None] * depth)
        grid = np.repeat((source.normal(size=WAVES) @ waves)[:, None], heads, axis=1)
    else:
        grid = source.normal(size=(layers, heads))
    return np.sign(direction) * grid / np.sqrt(np.mean(grid**2))


def step_size(task: SearchTask, records: Sequence[TrialRecord]) -> float:
    """Length of the next step: it grew with every refinement that was better than its base and shrank with others."""
    step = INITIAL_STEP
    for record in records:
        if record.parent_trial:
            step *= GROWN if is_improvement(task, record, records[record.parent_trial - 1]) else SHRUNK
            step = min(MAX_STEP, max(MIN_STEP, step))
    return round(step, 4)


def is_improvement(task: SearchTask, record: TrialRecord, base: TrialRecord) -> bool:
    """Whether a trial measured better than another one on all windows."""
    return record.status == "finished" and task.goal.objective_value(record.metrics) < task.goal.objective_value(base.metrics)


def _base(task: SearchTask, records: Sequence[TrialRecord], number: int) -> TrialRecord:
    if not task.goal.front:
        return best_trials(records, task.goal)[0]
    front = non_dominated(finished_trials(records), lambda record: task.goal.pareto_values(record.metrics))
    return front[number % len(front)]


def _direction(base: TrialRecord, proposed: Sequence[Params]) -> int:
    """The base's own step again, else the way back from a step that it did not gain by, else a new direction."""
    tried = [params["direction"] for params in proposed if params["base"] == base.trial]
    own = base.params.get("direction")
    if own is not None and own not in tried:
        return int(own)
    back = [-direction for direction in tried if direction != own and -direction not in tried]
    return back[0] if back else 1 + max((abs(params["direction"]) for params in proposed), default=0)


def _shifts(base: TrialRecord, geometry: CacheGeometry) -> Shifts:
    return np.array(base.params.get("shifts", np.zeros((len(geometry.budgetable), geometry.kv_heads))))
