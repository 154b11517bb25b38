"""What happens when a trial ends: its line in `trials.jsonl`, its run in MLflow, its line on the screen."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ray import tune
from ray.exceptions import RayError

from baklava.errors import UserError
from baklava.progress import say
from tuning.cluster import Crew
from tuning.journal import Journal
from tuning.stopping import Stop
from tuning.task import Task
from tuning.tracking import Tracker
from tuning.trials import Status, TrialRecord, best_of


class Recorder(tune.Callback):
    """Tells everyone about finished trials, the journal first.

    It never raises: Tune would call that a failure of the trial, and have it recorded once more. Where the journal
    takes no more, the search is stopped.
    """

    def __init__(self, journal: Journal[TrialRecord], tracker: Tracker, crew: Crew, task: Task, trials: int) -> None:
        self.journal, self.tracker, self.crew, self.task, self.trials = journal, tracker, crew, task, trials
        self.stop, self.begun = Stop(), False
        self.started, self.before = time.monotonic(), len(journal.records)
        self.plans = _plans(journal.records, task)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles callbacks into its snapshots, which `trials.jsonl` makes needless."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The first one ends what people wait for at the start."""
        if not self.begun:
            self.begun = True
            say("trials: the first one is under way")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial that scored all windows, was stopped, or gave a reason why it cannot be scored."""
        self._record(trial.config, trial.last_result or {}, (trial.last_result or {}).get("failed"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial whose process died, again after its restarts."""
        self._record(trial.config, trial.last_result or {}, f"{trial.get_error() or 'its process died'}")

    def end(self, error: UserError) -> None:
        """Record and begin no more trials, and end the search with this error."""
        self.stop.error = self.stop.error or error
        self.stop.asked = True

    def _record(self, params: dict[str, Any], result: dict[str, Any], error: str | None) -> None:
        if self.stop.error:  # what ends the search may be what this trial failed of, and a resumed one has it anew
            return
        windows, number = tuple(result.get("windows", ())), len(self.journal.records) + 1
        plan = None if error else self.task.plan(params)
        first = self.plans.get(plan.digest, number) if plan else number
        record = TrialRecord(
            trial=number,
            params=params,
            metrics=result.get("metrics", {}),
            status=self._status(len(windows), error),
            windows=windows,
            error=error,
            twin=first if first < number else None,
        )
        try:
            self.journal.append(record)
        except UserError as full:
            self.end(full)
            return
        if plan:
            self.plans.setdefault(plan.digest, number)
        self.tracker.trial(record, plan, result.get("time_total_s", 0.0))
        with suppress(RayError):  # without a pool, no trial will be scored, and each will say so
            self.crew.tell()
        say(self._line(record))

    def _status(self, windows: int, error: str | None) -> Status:
        if error:
            return "failed"
        return "finished" if windows == len(self.task.windows) else "pruned"

    def _line(self, record: TrialRecord) -> str:
        refined = [f"refined from trial {record.refines}"] if record.refines else []
        same = [f"the same plan as trial {record.twin}"] if record.twin else []
        parts = [f"trial {record.trial} of {self.trials}: {self._outcome(record)}", *refined, *same, *self._best()]
        return ", ".join([*parts, f"{self._minutes_left()} left"])

    def _best(self) -> list[str]:
        if self.task.goal.front:  # of many sizes, the best by loss alone is only the largest
            return []
        best = best_of(self.journal.records, self.task.goal)
        return [f"best so far {self._value(record)} (trial {record.trial})" for record in best]

    def _outcome(self, record: TrialRecord) -> str:
        ended: dict[Status, Callable[[], str]] = {
            "finished": lambda: self._value(record),
            "pruned": lambda: f"{self._value(record)} after {len(record.windows)} windows, stopped early",
            "failed": lambda: f"failed, {record.error}",
        }
        return ended[record.status]()

    def _value(self, record: TrialRecord) -> str:
        return self.task.goal.told(record.metrics)

    def _minutes_left(self) -> str:
        done = len(self.journal.records) - self.before
        seconds = (time.monotonic() - self.started) / max(1, done) * (self.trials - len(self.journal.records))
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _plans(records: Sequence[TrialRecord], task: Task) -> dict[str, int]:
    """The first trial of each plan, by digest."""
    first: dict[str, int] = {}
    for record in records:
        if record.status != "failed":
            first.setdefault(task.plan(record.params).digest, record.trial)
    return first
