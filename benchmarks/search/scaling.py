"""How a search scales: real workers, and workers that sleep instead of scoring, so that only the dispatch is timed."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import ray

from baklava.console import log
from baklava.runtime.ray_session import ray_session
from benchmarks.search.timed_search import SearchBenchmarkConfig
from tuning.search.inputs import SearchInputs
from tuning.search.trial_loop import TrialLoop, TrialRecorder, WarmStart
from tuning.study.journal import Journal
from tuning.study.search_space import SearchTask
from tuning.study.settings import SearchSettings
from tuning.study.trial import TrialRecord
from tuning.tracking.tracker import Tracker
from tuning.workers.cluster import OBJECT_STORE_BYTES, WorkerGroup, WorkerLayout

THREADS_PER_WORKER = 1


class SleepingWorker:
    """A scoring worker that loads neither a model nor torch, and returns the same scores for every plan."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def ping(self) -> int:
        """Return the process id."""
        return os.getpid()

    def prefill(self, window: Any) -> None:
        """Do nothing, since nothing is prefilled."""

    def status(self) -> None:
        """Return None, since there is nothing to report."""

    def release(self, windows: Sequence[str]) -> None:
        """Do nothing, since nothing is in memory."""

    def score(self, plan_json: str, window: Any) -> dict[str, Any]:
        """Sleep, and return constant scores."""
        time.sleep(self.seconds)
        scores = {"nll_full": 1.0, "nll": 1.1, "dnll": 0.1, "kl": 0.1, "allocated_bytes": 1, "seconds": self.seconds}
        return {"window": window.name, "document": window.document, **scores}


class NullTracker:
    """A tracker that records nothing."""

    def trial(self, record: TrialRecord, plan: Any, seconds: float) -> None:
        """Do nothing."""


def measure_scaling(
    config: SearchBenchmarkConfig, settings: SearchSettings, inputs: SearchInputs, task: SearchTask
) -> dict[str, Any]:
    """Return the windows per second that one worker scores, and that two workers score."""
    rates = {}
    settings = settings.model_copy(update={"trials": config.scaling_trials})
    for num_workers in (1, 2):
        log(f"scaling: workers: {num_workers}, threads of each: {THREADS_PER_WORKER}")
        with ray_session(object_store_bytes=OBJECT_STORE_BYTES):
            layout = WorkerLayout(num_workers, THREADS_PER_WORKER)
            workers = WorkerGroup.for_search(settings.model, layout, inputs.splits.search, task)
            _, rates[num_workers] = _run_search(workers, settings, task)
    return {"threads": THREADS_PER_WORKER, "one": rates[1], "two": rates[2], "speedup": rates[2] / rates[1]}


def measure_dispatch(
    config: SearchBenchmarkConfig, settings: SearchSettings, inputs: SearchInputs, task: SearchTask
) -> list[dict[str, Any]]:
    """Return the trials per second with several numbers of sleeping workers."""
    settings = settings.model_copy(update={"trials": config.dispatch_trials})
    results = []
    for num_workers in config.dispatch_workers:
        log(f"dispatch: workers: {num_workers}, each sleeps {config.sleep_seconds:g} s per window")
        with ray_session(object_store_bytes=OBJECT_STORE_BYTES):
            actor = ray.remote(SleepingWorker).options(num_cpus=0)
            actors = [actor.remote(config.sleep_seconds) for _ in range(num_workers)]
            rate, _ = _run_search(WorkerGroup(actors, inputs.splits.search, task), settings, task)
        results.append(
            {
                "workers": num_workers,
                "trials_per_second": rate,
                "ideal_trials_per_second": num_workers / (config.sleep_seconds * len(task.windows)),
                "seconds_per_trial": 1 / rate,
            }
        )
    return results


def _run_search(workers: WorkerGroup, settings: SearchSettings, task: SearchTask) -> tuple[float, float]:
    """Return trials and windows per second of a search, from when its workers are ready."""
    # With random draws the sampler's time does not grow with the trials, and no two plans are equal.
    settings = settings.model_copy(update={"refine": 0, "sampler": "random"})
    workers.wait_until_ready()
    workers.prefill(task.windows)
    with TemporaryDirectory(prefix="baklava-scaling-") as folder:
        journal: Journal[TrialRecord] = Journal(Path(folder) / "trials.jsonl")
        recorder = TrialRecorder(journal, cast(Tracker, NullTracker()), workers, task, settings.trials)
        started = time.perf_counter()
        TrialLoop(settings, task, journal, workers, recorder, WarmStart()).run()
        seconds = time.perf_counter() - started
    num_windows = sum(len(record.windows) for record in journal.records if record.twin is None)
    return len(journal.records) / seconds, num_windows / seconds
