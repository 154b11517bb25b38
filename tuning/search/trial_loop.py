"""The trials of a search, run by Ray Tune and recorded in the journal, MLflow and the log as they end."""

import logging
import tempfile
import time
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
from tuning.optimizers.local_search import LocalSearch, PairedPruner
from tuning.optimizers.optuna_search import PlanOptunaSearch, RelativeLossPruner, SamplerConfig
from tuning.search.inputs import WarmStart
from tuning.study.interrupt import StopFlag, graceful_interrupt
from tuning.study.journal import Journal
from tuning.study.search_space import SearchTask
from tuning.study.settings import SearchSettings
from tuning.study.trainable import trainable
from tuning.study.trial import TrialRecord, TrialStatus, best_trials, finished_trials
from tuning.tracking.tracker import Tracker
from tuning.workers.cluster import TRIAL_CPUS, WorkerGroup

MAX_NODE_FAILURES = 3
"""How often a trial is restarted because its process or node died; a plan that fails is never tried again."""

MIN_TRIALS_PER_SLOT = 4
"""Minimum number of trials that run one after another in a slot: a sampler learns only from trials that ended."""


class TrialRecorder(tune.Callback):
    """Records every trial that ends: in the journal first, then in MLflow and in the log.

    It never raises: Tune would count an exception as a failure of the trial, and record the trial twice. If the journal
    cannot be written, the search is stopped.
    """

    def __init__(
        self, journal: Journal[TrialRecord], tracker: Tracker, group: WorkerGroup, task: SearchTask, num_trials: int
    ) -> None:
        self.journal, self.tracker, self.group, self.task, self.num_trials = journal, tracker, group, task, num_trials
        self.stop = StopFlag()
        self.has_started = False
        self.started_at = time.monotonic()
        self.num_recorded_before = len(journal.records)
        self.first_trial_of: dict[str, int] = {}  # by the digest of the plan
        for record in journal.records:
            if record.status != "failed":
                self.first_trial_of.setdefault(record.digest or task.plan(record.params).digest, record.trial)

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles callbacks into its snapshots, which `trials.jsonl` makes superfluous."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log that the first trial runs."""
        if not self.has_started:
            self.has_started = True
            log("trials: the first one is running")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a trial that scored all windows, was stopped early, or reported why it cannot be scored."""
        self._record(trial.config, trial.last_result or {}, (trial.last_result or {}).get("failed"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a trial whose process died again after its restarts."""
        self._record(trial.config, trial.last_result or {}, f"{trial.get_error() or 'its process died'}")

    def abort(self, error: UserError) -> None:
        """Start and record no more trials, and end the search with this error."""
        self.stop.error = self.stop.error or error
        self.stop.requested = True

    def _record(self, params: dict[str, Any], result: dict[str, Any], error: str | None) -> None:
        if self.stop.error:  # it may be why this trial failed; a resumed search tries the trial again
            return
        windows = tuple(result.get("windows", ()))
        status: TrialStatus = "finished" if len(windows) == len(self.task.windows) else "pruned"
        number = len(self.journal.records) + 1
        plan = None if error else self.task.plan(params)
        first = self.first_trial_of.get(plan.digest, number) if plan else number
        record = TrialRecord(
            trial=number,
            params=params,
            metrics=result.get("metrics", {}),
            status="failed" if error else status,
            windows=windows,
            error=error,
            digest=plan.digest if plan else None,
            twin=first if first < number else None,
        )
        try:
            self.journal.append(record)
        except UserError as unwritable:
            self.abort(unwritable)
            return
        if plan:
            self.first_trial_of.setdefault(plan.digest, number)
        self.tracker.log_trial(record, plan, result.get("time_total_s", 0.0))
        with suppress(RayError):  # if the scheduler is gone, every trial fails and says so
            self.group.report_events()
        log(self._describe(record))

    def _describe(self, record: TrialRecord) -> str:
        goal = self.task.goal
        if record.status == "failed":
            outcome = f"failed, {record.error}"
        else:
            outcome = goal.format_metrics(record.metrics)
            if record.status == "pruned":
                outcome += f" after {len(record.windows)} windows, stopped early"
        parts = [f"trial {record.trial} of {self.num_trials}: {outcome}"]
        if record.parent_trial:
            parts.append(f"refined from trial {record.parent_trial}")
        if record.twin:
            parts.append(f"the same plan as trial {record.twin}")
        if not goal.front:  # on a front, the best by loss alone is just the largest plan
            parts += [
                f"best so far {goal.format_metrics(best.metrics)} (trial {best.trial})"
                for best in best_trials(self.journal.records, goal)
            ]
        return ", ".join([*parts, f"{self._time_left()} left"])

    def _time_left(self) -> str:
        done = len(self.journal.records) - self.num_recorded_before
        seconds_per_trial = (time.monotonic() - self.started_at) / max(1, done)
        seconds = seconds_per_trial * (self.num_trials - len(self.journal.records))
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


@dataclass(frozen=True)
class TrialLoop:
    """Runs the trials of a search: first those that a sampler proposes, then the local search around the best."""

    settings: SearchSettings
    task: SearchTask
    journal: Journal[TrialRecord]
    group: WorkerGroup
    recorder: TrialRecorder
    warm_start: WarmStart

    def run(self) -> None:
        """Run the trials that the journal still lacks.

        Searchers learn of earlier trials from the journal, not from a snapshot of Tune's, which is always a little
        older.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; after one press, the running trials have ended.
            UserError: trials can no longer be recorded.
        """
        stop = self.recorder.stop
        with graceful_interrupt(stop):
            for run_phase in (self._sample, self._refine):
                run_phase(stop)
                stop.raise_if_requested()

    def _sample(self, stop: StopFlag) -> None:
        settings, task, warm_start = self.settings, self.task, self.warm_start
        sampled = [record for record in self.journal.records if not record.parent_trial]
        missing = settings.trials - settings.num_refinements - len(sampled)
        if missing > 0:
            log(f"search: {missing} trials for {task.goal.description}, {len(task.windows)} windows each")
            sampler = SamplerConfig(settings.sampler, settings.seed, settings.trials)
            known = warm_start.known_trials
            searcher = PlanOptunaSearch(task, sampler, sampled, stop, known, warm_start.enqueued_params)
            self._tune(searcher, RelativeLossPruner(task, [*known, *sampled]), missing)

    def _refine(self, stop: StopFlag) -> None:
        missing = self.settings.trials - len(self.journal.records)
        if missing > 0 and finished_trials(self.journal.records):
            log(f"search: {missing} refinements of the best so far")
            searcher = LocalSearch(self.task, self.settings.seed, self.journal, stop)
            self._tune(searcher, PairedPruner(self.task, self.journal), missing)

    def _tune(self, searcher: Searcher, pruner: TrialScheduler, num_trials: int) -> None:
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        max_concurrent, prefetch = concurrency(self.settings, len(self.group.actors))
        trial = partial(
            trainable,
            scheduler=self.group.scheduler,
            windows=self.task.windows,
            goal=self.task.goal,
            prefetch=prefetch,
        )
        with tempfile.TemporaryDirectory(prefix="baklava-tune-") as folder:
            tune.Tuner(
                tune.with_resources(trial, {"cpu": TRIAL_CPUS}),
                tune_config=tune.TuneConfig(
                    metric="objective",
                    mode="min",
                    search_alg=searcher,
                    scheduler=pruner,
                    num_samples=num_trials,
                    max_concurrent_trials=max_concurrent,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=folder,
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=MAX_NODE_FAILURES),
                    callbacks=[self.recorder],
                ),
            ).fit()


def concurrency(settings: SearchSettings, num_workers: int) -> tuple[int, int]:
    """Return how many trials run at once, and how many windows of each, so that no worker is idle.

    There is one trial more than workers, since a trial that ends leaves a gap before the next one. With many workers
    there are fewer trials, each with several windows in flight.
    """
    trials = settings.concurrent or max(2, min(num_workers + 1, settings.trials // MIN_TRIALS_PER_SLOT))
    return trials, -(-(num_workers + 1) // trials)
