"""What proposes trials and what stops them early: Optuna's TPE and a rule of halving, both told of earlier trials."""

import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from tuning.goal import Metrics
from tuning.heuristics import first_params
from tuning.space import Params
from tuning.task import Task
from tuning.trials import TrialRecord, reported

STARTUP_TRIALS = 8
"""Trials, the heuristics among them, before TPE models the space: a quarter of a usual search."""

GRACE_WINDOWS = 2
"""Windows that every trial is scored on: the spread between documents makes one window too few to stop on."""

COMPARED_TRIALS = 5
"""Trials that must have reached a window before another is stopped there."""


class PlanSearch(OptunaSearch):
    """OptunaSearch that tells a stopped or failed trial from a finished one, and starts from recorded trials.

    Tune hands over the last report of a stopped trial as if it were its result; a mean over the first windows would
    mix into the model as if it were over all of them. Optuna has states for both cases. For a front it lowers two
    numbers at once, the size and the loss.
    """

    def __init__(self, task: Task, seed: int, known: Sequence[TrialRecord]) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.windows, space = len(task.windows), task.space
        super().__init__(
            space.suggest,
            metric=["ratio", "objective"] if task.goal.front else "objective",
            mode=["min", "min"] if task.goal.front else "min",
            points_to_evaluate=_not_tried(first_params(space), known),
            # The draws before a resume are not to be repeated after it.
            sampler=_sampler(seed + len(known)),
        )
        for record in known:
            self._ot_study.add_trial(_recalled(record, task))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The running mean after one more window."""
        if "failed" not in result:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial that scored all windows, was stopped, or failed: complete, pruned, or failed in Optuna's words."""
        failed = error or not result or "failed" in result
        complete = result if result and len(result.get("windows", ())) == self.windows else None
        super().on_trial_complete(trial_id, complete, error=failed)


class Halving(FIFOScheduler):
    """Stops a trial after a window if most trials of no more bytes lost less up to there.

    All trials are scored on the same windows in the same order, so running means compare exactly, and half of them
    going on is successive halving without its rungs. Unlike ASHA it stops nothing before it has seen a handful, so
    that there are always finished trials to choose from on validation. Where the budget is given, all plans count as of
    one size.
    """

    def __init__(self, task: Task, known: Sequence[TrialRecord]) -> None:
        super().__init__()
        self.goal, self.windows = task.goal, len(task.windows)
        self.seen: dict[int, list[tuple[float, float]]] = {step: [] for step in range(1, self.windows + 1)}
        for record in known:
            for step in range(1, len(record.windows) + 1):
                self.seen[step].append(self._size_and_loss(record.after(step)))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
        if "failed" in result:
            return TrialScheduler.CONTINUE
        step, (size, loss) = len(result["windows"]), self._size_and_loss(reported(result))
        others = [lost for held, lost in self.seen[step] if held <= size]
        better = sum(lost < loss for lost in others)
        stop = GRACE_WINDOWS <= step < self.windows and len(others) >= COMPARED_TRIALS and 2 * better > len(others)
        self.seen[step].append((size, loss))
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def _size_and_loss(self, metrics: Metrics) -> tuple[float, float]:
        return (metrics["ratio"] if self.goal.draws_budget else 0.0), self.goal.loss(metrics)


def _sampler(seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # Several trials run at once: counting those under way as bad keeps them apart.
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, group=True, constant_liar=True
        )


def _not_tried(points: Sequence[Params], known: Sequence[TrialRecord]) -> list[Params]:
    tried = [record.params for record in known]
    return [params for params in points if params not in tried]


def _recalled(record: TrialRecord, task: Task) -> optuna.trial.FrozenTrial:
    state = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[record.status]
    goal, steps = task.goal, range(1, len(record.windows) + 1)
    return create_trial(
        state=state,
        values=_values(record, task) if state is TrialState.COMPLETE else None,
        params=record.params,
        distributions=task.space.distributions(record.params),
        # Optuna has none for two objectives.
        intermediate_values={} if goal.front else {step: goal.value(record.after(step)) for step in steps},
    )


def _values(record: TrialRecord, task: Task) -> list[float]:
    value = task.goal.value(record.metrics)
    return [record.metrics["ratio"], value] if task.goal.front else [value]
