"""The trials of a search, run by Ray Tune and recorded in the journal, MLflow and the log as they end.

A warm start gives the sampler the trials of an earlier search.
"""

import logging
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from ray import tune
from ray.exceptions import RayError
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from baklava.console import log
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from baklava.serialization import FrozenModel, atomic_write_text
from tuning.optimizers.local_search import LocalSearch, PairedPruner
from tuning.optimizers.optuna_search import PlanOptunaSearch, RelativeLossPruner, SamplerConfig, in_space
from tuning.search.inputs import SearchInputs
from tuning.selection.validation import top_trials
from tuning.study.interrupt import StopFlag, graceful_interrupt
from tuning.study.journal import Journal
from tuning.study.search_space import SearchTask
from tuning.study.settings import SearchRecord, SearchSettings
from tuning.study.trainable import trainable
from tuning.study.trial import TRIALS_FILE, TrialRecord, TrialStatus, best_trials, finished_trials
from tuning.workers.cluster import TRIAL_CPUS, WorkerGroup

NUM_ENQUEUED = 4
"""How many of the best earlier trials are tried again, before any other."""

WARM_START_FILE = "warm.json"


class WarmStart(FrozenModel):
    """Parameters to try first, and trials whose scores count as if they were of this search.

    It is saved with the results, so that a resumed search does not depend on the earlier one's folder.
    """

    enqueued_params: tuple[dict[str, Any], ...] = ()
    scored_trials: tuple[TrialRecord, ...] = ()

    @property
    def known_trials(self) -> tuple[TrialRecord, ...]:
        """The scored trials that are not tried again, which the sampler learns from at once."""
        return tuple(record for record in self.scored_trials if record.params not in self.enqueued_params)

    def write(self, out: Path) -> None:
        """Save it in a search's folder, unless it is empty."""
        if self.enqueued_params:
            atomic_write_text(out / WARM_START_FILE, self.model_dump_json(exclude_none=True) + "\n")

    @classmethod
    def read(cls, out: Path) -> Self:
        """Return the warm start of a search, an empty one if it had none; raise UserError for an invalid file."""
        try:
            return cls.model_validate_json((out / WARM_START_FILE).read_text())
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError):
            raise UserError(
                f"{out / WARM_START_FILE} was changed since the search wrote it, or another version of baklava wrote "
                "it; restore it, or start a new search without --resume"
            ) from None


def load_warm_start(settings: SearchSettings, inputs: SearchInputs, task: SearchTask) -> WarmStart:
    """Return what the search of `settings.warm_start` offers this one; an empty warm start if there is none.

    Scores are taken over if they were measured on the same windows for plans of the same size. Otherwise only the best
    parameters are, and scored again.

    Raises:
        UserError: no search there, one of another model, or one with no trial that lies in this search space.
    """
    if settings.warm_start is None:
        return WarmStart()
    out = Path(settings.warm_start)
    record = SearchRecord.read(out, "--warm-start")
    if record.model.config_hash != inputs.identity.config_hash:
        raise UserError(
            f"--warm-start {out} searched plans for {record.settings.model}, which do not fit {settings.model}; "
            "give a search of the same model, or leave it out"
        )
    sampler = _sampler_config(settings, task)
    trials = _trials_in_space(Journal.read(out / TRIALS_FILE, TrialRecord.model_validate_json), task)
    trials = [trial for trial in trials if sampler.is_compatible(trial.params)]
    if not finished_trials(trials):
        raise UserError(
            f"--warm-start {out} has no finished trial in this search space; leave it out, or search the same --bits "
            "with the same --sampler"
        )
    reason = incompatibility(record, settings, inputs)
    reused = (
        f"the best parameters, not their scores ({reason})," if reason else f"{len(trials)} trials and their scores"
    )
    log(f"warm start: {reused} of {out}")
    best = top_trials(finished_trials(trials), record.settings.goal, NUM_ENQUEUED)
    # The best are tried again so that they can win. It costs nothing if their scores are known.
    return WarmStart(
        enqueued_params=tuple(trial.params for trial in best), scored_trials=() if reason else tuple(trials)
    )


def _sampler_config(settings: SearchSettings, task: SearchTask) -> SamplerConfig:
    return SamplerConfig(settings.sampler, settings.seed, settings.trials, task.space.evictions[0])


def incompatibility(record: SearchRecord, settings: SearchSettings, inputs: SearchInputs) -> str | None:
    """Return why the scores of an earlier search do not compare with this one's; None if they do."""
    earlier = record.settings
    for option in ("context", "continuation", "seed"):
        if getattr(earlier, option) != getattr(settings, option):
            return f"its --{option} was {getattr(earlier, option)}"
    if record.corpora != inputs.corpora:
        return "its texts were different"
    if record.profile != inputs.profile.digest:
        return "its weights or calibration were different"
    if settings.latency and not earlier.latency:
        return "it did not time decoding"
    old, new = earlier.goal, settings.goal
    if old.samples_budget != new.samples_budget or (not new.samples_budget and old.budget != new.budget):
        return "it was for another size"
    return None


def _trials_in_space(records: Sequence[TrialRecord], task: SearchTask) -> list[TrialRecord]:
    """The sampled trials that this search could sample too; they get a budget if it samples budgets, or lose theirs."""
    budgets = task.space.budget_range
    in_this_space = []
    for record in records:
        params = {name: value for name, value in record.params.items() if name != "budget"}
        if budgets:
            budget = record.params.get("budget", record.metrics.get("ratio", budgets[1]))
            params["budget"] = min(budgets[1], max(budgets[0], budget))
        if not record.parent_trial and in_space(task.space, params):
            in_this_space.append(record.model_copy(update={"params": params}))
    return in_this_space


MAX_NODE_FAILURES = 3
"""How often a trial is restarted because its process or node died; a plan that fails is never tried again."""

MIN_TRIALS_PER_SLOT = 4
"""Minimum number of trials that run one after another in a slot: a sampler learns only from trials that ended."""


class TrialLog(Protocol):
    """Where trials are recorded besides the journal."""

    def log_trial(self, record: TrialRecord, plan: BudgetPlan | None, seconds: float) -> None:
        """Record a trial that just ended."""


class TrialRecorder(tune.Callback):
    """Records every trial that ends: in the journal first, then in MLflow and in the log.

    It never raises: Tune would count an exception as a failure of the trial, and record the trial twice. If the journal
    cannot be written, the search is stopped.
    """

    def __init__(
        self, journal: Journal[TrialRecord], tracker: TrialLog, group: WorkerGroup, task: SearchTask, num_trials: int
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
                f"best over all windows so far {goal.format_metrics(best.metrics)} (trial {best.trial})"
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
            then = f"; {settings.num_refinements} refinements follow" if settings.num_refinements else ""
            log(f"search: {missing} trials for {task.goal.description}, {len(task.windows)} windows each{then}")
            sampler = _sampler_config(settings, task)
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
