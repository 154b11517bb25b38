"""Local search: the last trials start from the best so far and move bytes between layers and heads.

A (1+1) evolution strategy: try a step in a direction, the opposite step if it did not help, and the same step again if
it did. All its decisions follow from the recorded trials, so that a resumed search continues as it would have.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from baklava.plan.geometry import CacheGeometry
from tuning.study.interrupt import StopFlag
from tuning.study.journal import Journal
from tuning.study.objective import non_dominated
from tuning.study.search_space import Params, SearchTask
from tuning.study.trial import TrialRecord, best_trials, finished_trials, reported_metrics

INITIAL_STEP, MIN_STEP, MAX_STEP = 0.4, 0.05, 1.5
"""Root mean square of the shifts of one step, in powers of two: the first step changes a head by a third."""

STEP_UP, STEP_DOWN = 1.5, 0.85
"""Factors of the step size after a success and after a failure: stable at two successes in seven."""

NUM_COSINES = 4
"""Cosines over depth that make up a smooth direction."""

BUDGET_STEP = 0.1
"""Change of the budget per unit of step size, in powers of two, if the goal is the smallest feasible plan.

The budget shrinks if the base is feasible, and grows otherwise.
"""

Shifts = Float[np.ndarray, "layers kv_heads"]


class LocalSearch(Searcher):
    """Proposes refinements of the best finished trial, or of the trials of the front in turn."""

    def __init__(self, task: SearchTask, seed: int, journal: Journal[TrialRecord], stop: StopFlag) -> None:
        super().__init__(metric="objective", mode="min")
        self.task = task
        self.seed = seed
        self.journal = journal
        self.stop = stop
        self.proposed = [record.params for record in journal.records if record.parent_trial]

    def suggest(self, trial_id: str) -> Params | str | None:
        """Return the parameters of the next trial, or FINISHED if a stop was requested."""
        if self.stop.requested:
            return Searcher.FINISHED
        self.proposed.append(propose(self.task, self.seed, self.journal.records, self.proposed))
        return self.proposed[-1]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: the journal has the trial."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the state is in the journal."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the state is in the journal."""


class PairedPruner(FIFOScheduler):
    """Stops a refined trial that is worse than its base, once half of the windows are scored."""

    def __init__(self, task: SearchTask, journal: Journal[TrialRecord]) -> None:
        super().__init__()
        self.task = task
        self.journal = journal

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether the trial continues."""
        step, num_windows = len(result.get("windows", ())), len(self.task.windows)
        if "failed" in result or not (num_windows + 1) // 2 <= step < num_windows:
            return TrialScheduler.CONTINUE
        base = self.journal.records[trial.config["base"] - 1]
        expected = self._expected_value(base, reported_metrics(result), step)
        is_worse = expected > self.task.goal.objective_value(base.metrics)
        return TrialScheduler.STOP if is_worse else TrialScheduler.CONTINUE

    def _expected_value(self, base: TrialRecord, metrics: dict[str, float], step: int) -> float:
        """The objective over all windows, if the remaining ones change both trials as the first `step` did."""
        so_far, final = base.metrics_after(step), base.metrics
        expected = {name: final[name] + metrics[name] - so_far[name] for name in ("dnll", "ppl")}
        geometric = final["kl_geometric"] * metrics["kl_geometric"] / so_far["kl_geometric"]
        return self.task.goal.objective_value({**metrics, **expected, "kl_geometric": geometric})


def propose(task: SearchTask, seed: int, records: Sequence[TrialRecord], proposed: Sequence[Params]) -> Params:
    """Return the parameters of the next refinement.

    Args:
        task: What is searched.
        seed: Seed of the directions.
        records: The ended trials; at least one must have finished.
        proposed: The parameters of all refinements so far, including those of running trials.
    """
    geometry = task.profile.geometry
    base = _choose_base(task, records, len(proposed))
    step = step_size(task, records)
    direction = _choose_direction(base, proposed)
    shifts = np.array(base.params.get("shifts", np.zeros((len(geometry.full_attention_layers), geometry.kv_heads))))
    shifts = shifts + step * direction_vector(direction, seed, geometry)
    moved = {"shifts": np.round(shifts, 3).tolist(), "base": base.trial, "direction": direction, "step": step}
    if task.goal.max_dnll is not None:
        sign = -1 if task.goal.is_feasible(base.metrics) else 1
        smallest, largest = task.space.budget_range or (0.0, 1.0)
        moved["budget"] = min(largest, max(smallest, base.params["budget"] * 2 ** (sign * BUDGET_STEP * step)))
    return {**base.params, **moved}


def direction_vector(direction: int, seed: int, geometry: CacheGeometry) -> Shifts:
    """Return shifts of root mean square 1: smooth over depth in odd directions, independent per head in even ones.

    Directions count from 1; the negative of one is the opposite direction.
    """
    layers, heads = len(geometry.full_attention_layers), geometry.kv_heads
    rng = np.random.default_rng([seed, abs(direction)])
    if direction % 2:
        depth = np.pi * (np.arange(layers) + 0.5) / layers
        cosines = np.cos(np.arange(1, NUM_COSINES + 1)[:, None] * depth)
        grid = np.repeat((rng.normal(size=NUM_COSINES) @ cosines)[:, None], heads, axis=1)
    else:
        grid = rng.normal(size=(layers, heads))
    return np.sign(direction) * grid / np.sqrt(np.mean(grid**2))


def step_size(task: SearchTask, records: Sequence[TrialRecord]) -> float:
    """Return the size of the next step: it grows after every trial that beat its base, and shrinks after the others."""
    step = INITIAL_STEP
    for record in records:
        if record.parent_trial:
            step *= STEP_UP if is_improvement(task, record, records[record.parent_trial - 1]) else STEP_DOWN
            step = min(MAX_STEP, max(MIN_STEP, step))
    return round(step, 4)


def is_improvement(task: SearchTask, record: TrialRecord, base: TrialRecord) -> bool:
    """Return whether a trial scored all windows and beat another one."""
    value = task.goal.objective_value
    return record.status == "finished" and value(record.metrics) < value(base.metrics)


def _choose_base(task: SearchTask, records: Sequence[TrialRecord], number: int) -> TrialRecord:
    if not task.goal.front:
        return best_trials(records, task.goal)[0]
    front = non_dominated(finished_trials(records), lambda record: task.goal.pareto_values(record.metrics))
    return front[number % len(front)]


def _choose_direction(base: TrialRecord, proposed: Sequence[Params]) -> int:
    """The base's own direction again, else the opposite of a direction that did not help, else a new one."""
    tried = [params["direction"] for params in proposed if params["base"] == base.trial]
    own = base.params.get("direction")
    if own is not None and own not in tried:
        return int(own)
    opposite = [-direction for direction in tried if direction != own and -direction not in tried]
    return opposite[0] if opposite else 1 + max((abs(params["direction"]) for params in proposed), default=0)
