"""Trials through Tune, the pool and replicas, without MLflow: with real scores, and with none."""

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import ray

from baklava.progress import say
from benchmarks.search.asked import Asked
from benchmarks.search.sleeping import Sleeper
from tuning.cluster import Crew, Fleet, session
from tuning.journal import Journal
from tuning.phases import Phases
from tuning.prepare import Material
from tuning.recorder import Recorder
from tuning.settings import SearchSettings
from tuning.task import Task
from tuning.tracking import Tracker
from tuning.trials import TrialRecord
from tuning.warm import Warm

THREADS = 1


class Untold:
    """Stands where MLflow does, and hears nothing."""

    def trial(self, record: TrialRecord, plan: Any, seconds: float) -> None:
        """Nothing."""


def scaling(asked: Asked, settings: SearchSettings, material: Material, task: Task) -> dict[str, Any]:
    """Windows scored per second by one replica of one thread, and by two."""
    rates = {}
    settings = settings.model_copy(update={"trials": asked.scaled_trials})
    for replicas in (1, 2):
        say(f"scaling: {replicas} replicas of {THREADS} thread")
        with session():
            windows = material.splits.search
            crew = Crew.of(settings.model, Fleet(replicas, THREADS), windows, task)
            rates[replicas] = _run(crew, settings, task)["windows"]
    return {"threads": THREADS, "one": rates[1], "two": rates[2], "times": rates[2] / rates[1]}


def dispatch(asked: Asked, settings: SearchSettings, material: Material, task: Task) -> list[dict[str, Any]]:
    """Trials per second where scoring is replaced by a sleep, for several numbers of replicas."""
    settings = settings.model_copy(update={"trials": asked.dispatched_trials})
    found = []
    for replicas in asked.dispatched:
        say(f"dispatch: {replicas} replicas that sleep {asked.sleep:g} s a window")
        with session():
            sleeper = ray.remote(Sleeper).options(num_cpus=0)
            crew = Crew([sleeper.remote(asked.sleep) for _ in range(replicas)], material.splits.search, task)
            rate = _run(crew, settings, task)["trials"]
        ideal = replicas / (asked.sleep * len(task.windows))
        found.append({"replicas": replicas, "per_second": rate, "ideal": ideal, "seconds_each": 1 / rate})
    return found


def _run(crew: Crew, settings: SearchSettings, task: Task) -> dict[str, float]:
    """Trials and windows per second of a search for its drawn trials, once the replicas are ready."""
    # Random draws, so that the sampler's time does not grow with the trials, and no two plans are the same.
    plain = settings.model_copy(update={"refine": 0, "sampler": "random"})
    crew.start()
    crew.hold(task.windows)
    with TemporaryDirectory(prefix="baklava-scaling-") as folder:
        journal: Journal[TrialRecord] = Journal(Path(folder) / "trials.jsonl")
        recorder = Recorder(journal, cast(Tracker, Untold()), crew, task, plain.trials)
        started = time.perf_counter()
        Phases(plain, task, journal, crew, recorder, Warm()).run()
        seconds = time.perf_counter() - started
    return {"trials": len(journal.records) / seconds, "windows": _windows(journal.records) / seconds}


def _windows(records: Sequence[TrialRecord]) -> int:
    return sum(len(record.windows) for record in records if record.twin is None)
