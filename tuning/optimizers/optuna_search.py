"""What proposes trials and what stops them early: Optuna and a rule for hopeless ones, both told of earlier trials."""

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from tuning.optimizers.baselines import initial_params
from tuning.optimizers.samplers import SamplerConfig, untried
from tuning.study.interrupt import StopFlag
from tuning.study.objective import Metrics
from tuning.study.search_space import Params, SearchTask
from tuning.study.trial import DECODE_SECONDS, GRACE_WINDOWS, TrialRecord, finished_trials, geometric_mean

MAX_LOSS_RATIO = 1.5
"""How many times the best trial's KL a trial may lose on the same windows before it is hopeless."""


MAX_RESAMPLES = 16
"""Times that a point is drawn anew which was drawn before, until it is scored once more as what it is: a twin."""


class PlanOptunaSearch(OptunaSearch):
    """OptunaSearch that tells a stopped or failed trial from a finished one, and starts from recorded trials.

    Tune hands over the last report of a stopped trial as if it were its result; a mean over the first windows would
    mix into the model as if it were over all of them. Optuna has states for both cases. For a front it lowers two
    numbers at once, the size and the loss, or three with the time of decoding.

    `known` trials are those of this search, `told` those of an earlier one; `points` come before the heuristics.
    """

    def __init__(
        self,
        task: SearchTask,
        sampling: SamplerConfig,
        known: Sequence[TrialRecord],
        stop: StopFlag,
        told: Sequence[TrialRecord] = (),
        points: Sequence[Params] = (),
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.windows, self.stop, space = len(task.windows), stop, task.space
        earlier = [record for record in (*told, *known) if sampling.is_compatible(record.params)]
        taught = [_recalled(record, task) for record in earlier]
        complete = [trial for trial in taught if trial.state is TrialState.COMPLETE]
        first = [params for params in (*points, *initial_params(space)) if sampling.is_compatible(params)]
        axes = ["ratio", "objective", *([DECODE_SECONDS] if task.goal.latency else [])]
        super().__init__(
            space.suggest,
            metric=axes if task.goal.front else "objective",
            mode=["min"] * len(axes) if task.goal.front else "min",
            points_to_evaluate=untried(first, [record.params for record in known]),
            sampler=sampling.build(len(known), complete),
        )
        for trial in taught:
            self._ot_study.add_trial(trial)
        self.drawn = [record.params for record in (*told, *known)]

    def suggest(self, trial_id: str) -> Params | str | None:
        """Parameters of the next trial, unless the search was asked to stop."""
        if self.stop.requested:
            return Searcher.FINISHED
        params = super().suggest(trial_id)
        for _ in range(MAX_RESAMPLES):
            if params not in self.drawn:
                break
            self._ot_study.tell(self._ot_trials.pop(trial_id), state=TrialState.FAIL)
            params = super().suggest(trial_id)
        self.drawn.append(params)
        return params

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The running mean after one more window."""
        if "failed" not in result:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial that scored all windows, was stopped, or failed: complete, pruned, or failed in Optuna's words."""
        failed = error or not result or "failed" in result
        complete = result if result and len(result.get("windows", ())) == self.windows else None
        super().on_trial_complete(trial_id, complete, error=failed)


class RelativeLossPruner(FIFOScheduler):
    """Stops a trial once it loses half as much again as the best of no more bytes did on the same windows.

    All trials are scored on the same windows in the same order, so the best one is compared up to the same window and
    no further. Losses are KLs, whatever is lowered: they have the least noise. Where the budget is given, all plans
    count as of one size. Where latency counts, none is hopeless: what loses more may be the fastest. Next to other
    rules in docs/lab-notes.md.
    """

    def __init__(self, task: SearchTask, known: Sequence[TrialRecord]) -> None:
        super().__init__()
        self.sized, self.windows, self.idle = task.goal.samples_budget, len(task.windows), task.goal.latency
        self.ended: list[tuple[float, list[float]]] = []
        for record in finished_trials(known):
            self.ended.append((self._size(record.metrics), _kls(record.windows)))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
        if "failed" in result or self.idle:
            return TrialScheduler.CONTINUE
        size, kls = self._size(result), _kls(result["windows"])
        if len(kls) == self.windows:
            self.ended.append((size, kls))
        rivals = [ended for held, ended in self.ended if held <= size]
        if not rivals or not GRACE_WINDOWS <= len(kls) < self.windows:
            return TrialScheduler.CONTINUE
        best = min(rivals, key=geometric_mean)[: len(kls)]
        return TrialScheduler.STOP if geometric_mean(kls) > MAX_LOSS_RATIO * geometric_mean(best) else TrialScheduler.CONTINUE

    def _size(self, numbers: Metrics) -> float:
        return numbers["ratio"] if self.sized else 0.0


def _kls(windows: Sequence[dict[str, Any]]) -> list[float]:
    return [window["kl"] for window in windows]


def _recalled(record: TrialRecord, task: SearchTask) -> optuna.trial.FrozenTrial:
    state = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[record.status]
    goal, steps = task.goal, range(1, len(record.windows) + 1)
    return create_trial(
        state=state,
        values=_values(record, task) if state is TrialState.COMPLETE else None,
        params=record.params,
        distributions=task.space.distributions(record.params),
        # Optuna has none for several objectives.
        intermediate_values={} if goal.front else {step: goal.objective_value(record.metrics_after(step)) for step in steps},
    )


def _values(record: TrialRecord, task: SearchTask) -> list[float]:
    return list(task.goal.pareto_values(record.metrics)) if task.goal.front else [task.goal.objective_value(record.metrics)]
