"""What happens when a trial ends: its line in `trials.jsonl`, its run in MLflow, its line on the screen."""

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray import tune
from ray.exceptions import RayError
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from baklava.console import log
from baklava.errors import UserError
from tuning.optimizers.local_search import PairedPruner, LocalSearch
from tuning.optimizers.optuna_search import RelativeLossPruner, PlanOptunaSearch
from tuning.optimizers.samplers import SamplerConfig
from tuning.search.warm_start import Warm
from tuning.study.interrupt import StopFlag, graceful_interrupt
from tuning.study.journal import Journal
from tuning.study.search_space import SearchTask
from tuning.study.settings import SearchSettings
from tuning.study.trainable import trainable
from tuning.study.trial import TrialStatus, TrialRecord, best_trials, finished_trials
from tuning.tracking.tracker import Tracker
from tuning.workers.cluster import TRIAL_CPUS, WorkerGroup


class Recorder(tune.Callback):
    """Tells everyone about finished trials, the journal first.

    It never raises: Tune would call that a failure of the trial, and have it recorded once more. Where the journal
    takes no more, the search is stopped.
    """

    def __init__(self, journal: Journal[TrialRecord], tracker: Tracker, crew: WorkerGroup, task: SearchTask, trials: int) -> None:
        self.journal, self.tracker, self.crew, self.task, self.trials = journal, tracker, crew, task, trials
        self.stop, self.begun = StopFlag(), False
        self.started, self.before = time.monotonic(), len(journal.records)
        self.plans = _plans(journal.records, task)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles callbacks into its snapshots, which `trials.jsonl` makes needless."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The first one ends what people wait for at the start."""
        if not self.begun:
            self.begun = True
            log("trials: the first one is under way")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial that scored all windows, was stopped, or gave a reason why it cannot be scored."""
        self._record(trial.config, trial.last_result or {}, (trial.last_result or {}).get("failed"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial whose process died, again after its restarts."""
        self._record(trial.config, trial.last_result or {}, f"{trial.get_error() or 'its process died'}")

    def end(self, error: UserError) -> None:
        """Record and begin no more trials, and end the search with this error."""
        self.stop.error = self.stop.error or error
        self.stop.requested = True

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
            self.crew.report_events()
        log(self._line(record))

    def _status(self, windows: int, error: str | None) -> TrialStatus:
        if error:
            return "failed"
        return "finished" if windows == len(self.task.windows) else "pruned"

    def _line(self, record: TrialRecord) -> str:
        refined = [f"refined from trial {record.parent_trial}"] if record.parent_trial else []
        same = [f"the same plan as trial {record.twin}"] if record.twin else []
        parts = [f"trial {record.trial} of {self.trials}: {self._outcome(record)}", *refined, *same, *self._best()]
        return ", ".join([*parts, f"{self._minutes_left()} left"])

    def _best(self) -> list[str]:
        if self.task.goal.front:  # of many sizes, the best by loss alone is only the largest
            return []
        best = best_trials(self.journal.records, self.task.goal)
        return [f"best so far {self._value(record)} (trial {record.trial})" for record in best]

    def _outcome(self, record: TrialRecord) -> str:
        ended: dict[TrialStatus, Callable[[], str]] = {
            "finished": lambda: self._value(record),
            "pruned": lambda: f"{self._value(record)} after {len(record.windows)} windows, stopped early",
            "failed": lambda: f"failed, {record.error}",
        }
        return ended[record.status]()

    def _value(self, record: TrialRecord) -> str:
        return self.task.goal.format_metrics(record.metrics)

    def _minutes_left(self) -> str:
        done = len(self.journal.records) - self.before
        seconds = (time.monotonic() - self.started) / max(1, done) * (self.trials - len(self.journal.records))
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _plans(records: Sequence[TrialRecord], task: SearchTask) -> dict[str, int]:
    """The first trial of each plan, by digest."""
    first: dict[str, int] = {}
    for record in records:
        if record.status != "failed":
            first.setdefault(task.plan(record.params).digest, record.trial)
    return first


NODE_FAILURES = 3
"""Times that a trial is started again because its process or node died; a plan that fails is never tried again."""


QUARTER = 4
"""Trials at once are no more than this part of all: a sampler learns only from those that ended."""


@dataclass(frozen=True)
class Phases:
    """All that the trials of a search need."""

    settings: SearchSettings
    task: SearchTask
    journal: Journal[TrialRecord]
    crew: WorkerGroup
    recorder: Recorder
    warm: Warm

    def run(self) -> None:
        """Run the trials that the journal still lacks.

        Earlier trials reach the searchers from the journal, not from a snapshot of Tune's: the journal is exact to the
        trial, a snapshot is always a little older.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; after one press, the trials that were under way have ended.
            UserError: trials can no longer be recorded.
        """
        stop = self.recorder.stop
        with graceful_interrupt(stop):
            for phase in (self._draw, self._refine):
                phase(stop)
                stop.check()

    def _draw(self, stop: StopFlag) -> None:
        settings, task, known = self.settings, self.task, drawn(self.journal.records)
        missing = settings.trials - settings.num_refinements - len(known)
        if missing > 0:
            log(f"search: {missing} trials for {task.goal.description}, {len(task.windows)} windows each")
            sampling = SamplerConfig(settings.sampler, settings.seed, settings.trials)
            search = PlanOptunaSearch(task, sampling, known, stop, self.warm.told, self.warm.points)
            self._tune(search, RelativeLossPruner(task, [*self.warm.told, *known]), missing)

    def _refine(self, stop: StopFlag) -> None:
        missing = self.settings.trials - len(self.journal.records)
        if missing > 0 and finished_trials(self.journal.records):
            log(f"search: {missing} refinements of the best so far")
            search = LocalSearch(self.task, self.settings.seed, self.journal, stop)
            self._tune(search, PairedPruner(self.task, self.journal), missing)

    def _tune(self, searcher: Searcher, scheduler: TrialScheduler, trials: int) -> None:
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        crew, task = self.crew, self.task
        at_once, ahead = lanes(self.settings, len(crew.actors))
        score = partial(trainable, scheduler=crew.scheduler, windows=task.windows, goal=task.goal, prefetch=ahead)
        with tempfile.TemporaryDirectory(prefix="baklava-tune-") as folder:
            tune.Tuner(
                tune.with_resources(score, {"cpu": TRIAL_CPUS}),
                tune_config=tune.TuneConfig(
                    metric="objective",
                    mode="min",
                    search_alg=searcher,
                    scheduler=scheduler,
                    num_samples=trials,
                    max_concurrent_trials=at_once,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=folder,
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=NODE_FAILURES),
                    callbacks=[self.recorder],
                ),
            ).fit()


def lanes(settings: SearchSettings, replicas: int) -> tuple[int, int]:
    """Trials at a time, and windows of each at a time, so that no replica is without work.

    One trial more than replicas, since a trial that ends leaves a gap before the next; with many replicas fewer trials,
    each with several windows under way.
    """
    usual = max(2, min(replicas + 1, settings.trials // QUARTER))
    at_once = settings.concurrent or usual
    return at_once, -(-(replicas + 1) // at_once)


def drawn(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that are no refinements."""
    return [record for record in records if not record.parent_trial]
