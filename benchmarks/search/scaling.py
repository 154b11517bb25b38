"""A replica that sleeps where others score, so that only the dispatch is timed. It loads no model, and not torch."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import ray

from baklava.console import log
from baklava.runtime.ray_session import ray_session
from benchmarks.search.config import Asked
from tuning.search.inputs import SearchInputs
from tuning.search.trial_loop import TrialLoop, TrialRecorder
from tuning.search.warm_start import WarmStart
from tuning.study.journal import Journal
from tuning.study.search_space import SearchTask
from tuning.study.settings import SearchSettings
from tuning.study.trial import TrialRecord
from tuning.tracking.tracker import Tracker
from tuning.workers.cluster import OBJECT_STORE_BYTES, WorkerGroup, WorkerLayout


class Sleeper:
    """Answers as a replica does, every plan with the same scores, after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def ping(self) -> int:
        """Process id."""
        return os.getpid()

    def prefill(self, window: Any) -> None:
        """Nothing to prefill."""

    def status(self) -> None:
        """Nothing is kept elsewhere."""

    def release(self, windows: Sequence[str]) -> None:
        """Nothing to free."""

    def score(self, plan_json: str, window: Any) -> dict[str, Any]:
        """The same scores for all."""
        time.sleep(self.seconds)
        numbers = {"nll_full": 1.0, "nll": 1.1, "dnll": 0.1, "kl": 0.1, "allocated_bytes": 1, "seconds": self.seconds}
        return {"window": window.name, "document": window.document, **numbers}


THREADS = 1


class Untold:
    """Stands where MLflow does, and hears nothing."""

    def trial(self, record: TrialRecord, plan: Any, seconds: float) -> None:
        """Nothing."""


def scaling(asked: Asked, settings: SearchSettings, material: SearchInputs, task: SearchTask) -> dict[str, Any]:
    """Windows scored per second by one replica of one thread, and by two."""
    rates = {}
    settings = settings.model_copy(update={"trials": asked.scaled_trials})
    for replicas in (1, 2):
        log(f"scaling: {replicas} replicas of {THREADS} thread")
        with ray_session(object_store_bytes=OBJECT_STORE_BYTES):
            windows = material.splits.search
            crew = WorkerGroup.for_search(settings.model, WorkerLayout(replicas, THREADS), windows, task)
            rates[replicas] = _run(crew, settings, task)["windows"]
    return {"threads": THREADS, "one": rates[1], "two": rates[2], "times": rates[2] / rates[1]}


def dispatch(asked: Asked, settings: SearchSettings, material: SearchInputs, task: SearchTask) -> list[dict[str, Any]]:
    """Trials per second where scoring is replaced by a sleep, for several numbers of replicas."""
    settings = settings.model_copy(update={"trials": asked.dispatched_trials})
    found = []
    for replicas in asked.dispatched:
        log(f"dispatch: {replicas} replicas that sleep {asked.sleep:g} s a window")
        with ray_session(object_store_bytes=OBJECT_STORE_BYTES):
            sleeper = ray.remote(Sleeper).options(num_cpus=0)
            crew = WorkerGroup([sleeper.remote(asked.sleep) for _ in range(replicas)], material.splits.search, task)
            rate = _run(crew, settings, task)["trials"]
        ideal = replicas / (asked.sleep * len(task.windows))
        found.append({"replicas": replicas, "per_second": rate, "ideal": ideal, "seconds_each": 1 / rate})
    return found


def _run(crew: WorkerGroup, settings: SearchSettings, task: SearchTask) -> dict[str, float]:
    """Trials and windows per second of a search for its drawn trials, once the replicas are ready."""
    # Random draws, so that the sampler's time does not grow with the trials, and no two plans are the same.
    plain = settings.model_copy(update={"refine": 0, "sampler": "random"})
    crew.wait_until_ready()
    crew.prefill(task.windows)
    with TemporaryDirectory(prefix="baklava-scaling-") as folder:
        journal: Journal[TrialRecord] = Journal(Path(folder) / "trials.jsonl")
        recorder = TrialRecorder(journal, cast(Tracker, Untold()), crew, task, plain.trials)
        started = time.perf_counter()
        TrialLoop(plain, task, journal, crew, recorder, WarmStart()).run()
        seconds = time.perf_counter() - started
    return {"trials": len(journal.records) / seconds, "windows": _windows(journal.records) / seconds}


def _windows(records: Sequence[TrialRecord]) -> int:
    return sum(len(record.windows) for record in records if record.twin is None)
