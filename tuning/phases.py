"""The trials of a search, in two phases: Optuna draws, then refinements start from the best that it drew."""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from baklava.progress import say
from tuning.cluster import TRIAL_CPUS, Crew
from tuning.journal import Journal
from tuning.objective import trial
from tuning.recorder import Recorder
from tuning.refine import Paired, Refinement
from tuning.samplers import Sampling
from tuning.searcher import Hopeless, PlanSearch
from tuning.settings import SearchSettings
from tuning.stopping import Stop, stoppable
from tuning.task import Task
from tuning.trials import TrialRecord, finished
from tuning.warm import Warm

NODE_FAILURES = 3
"""Times that a trial is started again because its process or node died; a plan that fails is never tried again."""


QUARTER = 4
"""Trials at once are no more than this part of all: a sampler learns only from those that ended."""


@dataclass(frozen=True)
class Phases:
    """All that the trials of a search need."""

    settings: SearchSettings
    task: Task
    journal: Journal[TrialRecord]
    crew: Crew
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
        with stoppable(stop):
            for phase in (self._draw, self._refine):
                phase(stop)
                stop.check()

    def _draw(self, stop: Stop) -> None:
        settings, task, known = self.settings, self.task, drawn(self.journal.records)
        missing = settings.trials - settings.refinements - len(known)
        if missing > 0:
            say(f"search: {missing} trials for {task.goal.asked}, {len(task.windows)} windows each")
            sampling = Sampling(settings.sampler, settings.seed, settings.trials)
            search = PlanSearch(task, sampling, known, stop, self.warm.told, self.warm.points)
            self._tune(search, Hopeless(task, [*self.warm.told, *known]), missing)

    def _refine(self, stop: Stop) -> None:
        missing = self.settings.trials - len(self.journal.records)
        if missing > 0 and finished(self.journal.records):
            say(f"search: {missing} refinements of the best so far")
            search = Refinement(self.task, self.settings.seed, self.journal, stop)
            self._tune(search, Paired(self.task, self.journal), missing)

    def _tune(self, searcher: Searcher, scheduler: TrialScheduler, trials: int) -> None:
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        crew, task = self.crew, self.task
        at_once, ahead = lanes(self.settings, len(crew.actors))
        score = partial(trial, pool=crew.pool, windows=task.windows, goal=task.goal, ahead=ahead)
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
    return [record for record in records if not record.refines]
