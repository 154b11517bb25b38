"""The trials of a search, in two phases: Optuna draws, then refinements start from the best that it drew."""

import logging
import tempfile
from collections.abc import Sequence
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
from tuning.searcher import Halving, PlanSearch
from tuning.settings import SearchSettings
from tuning.task import Task
from tuning.trials import TrialRecord, finished

NODE_FAILURES = 3
"""Times that a trial is started again because its process or node died; a plan that fails is never tried again."""


def run_trials(
    settings: SearchSettings, task: Task, journal: Journal[TrialRecord], crew: Crew, recorder: Recorder
) -> None:
    """Run the trials that the journal still lacks.

    Earlier trials reach the searchers from the journal, not from a snapshot of Tune's: the journal is exact to the
    trial, a snapshot is always a little older.
    """
    known = tuple(journal.records)
    missing = settings.trials - settings.refinements - len(drawn(known))
    if missing > 0:
        say(f"search: {missing} trials for {task.goal.asked}, {len(task.windows)} windows each")
        _tune(PlanSearch(task, settings.seed, drawn(known)), Halving(task, drawn(known)), missing, crew, task, recorder)
    missing = settings.trials - len(journal.records)
    if missing > 0 and finished(journal.records):
        say(f"search: {missing} refinements of the best so far")
        _tune(Refinement(task, settings.seed, journal), Paired(task, journal), missing, crew, task, recorder)


def drawn(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that are no refinements."""
    return [record for record in records if not record.refines]


def _tune(
    searcher: Searcher, scheduler: TrialScheduler, trials: int, crew: Crew, task: Task, recorder: Recorder
) -> None:
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    score = partial(trial, pool=crew.pool, windows=task.windows, goal=task.goal)
    with tempfile.TemporaryDirectory(prefix="baklava-tune-") as folder:
        tune.Tuner(
            tune.with_resources(score, {"cpu": TRIAL_CPUS}),
            tune_config=tune.TuneConfig(
                metric="objective",
                mode="min",
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=trials,
                max_concurrent_trials=len(crew.actors) + 1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=NODE_FAILURES),
                callbacks=[recorder],
            ),
        ).fit()
