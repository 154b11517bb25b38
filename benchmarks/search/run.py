"""Run the search benchmark, one part after the other, and write its results as Markdown."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray

from baklava.console import log
from baklava.errors import UserError
from baklava.evaluation.intervals import pluralize
from baklava.evaluation.speed import machine_info
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.ray_session import ray_session
from benchmarks.markdown_page import markdown_table
from benchmarks.search.baseline import compare_with_baseline
from benchmarks.search.timed_search import SearchBenchmarkConfig, measure_overhead, time_search
from tuning.search.inputs import SearchInputs, prepare_inputs
from tuning.search.trial_loop import TrialLoop, TrialRecorder, WarmStart
from tuning.study.journal import Journal
from tuning.study.search_space import SearchTask
from tuning.study.settings import SearchSettings
from tuning.study.trial import TrialRecord
from tuning.workers.cluster import OBJECT_STORE_BYTES, WorkerGroup, WorkerLayout

PARTS = ("overhead", "baseline", "scaling", "dispatch")
"""A search as a script; against one process per trial; with one worker and two; and with sleeping workers."""


def run_benchmark(config: SearchBenchmarkConfig, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """Return the results of these parts; the baseline includes the overhead, whose search it repeats.

    Raises:
        UserError: a part is unknown, or a search cannot be run.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise UserError(f"--parts {unknown[0]}: no such part; choose among {', '.join(PARTS)}")
    settings = SearchSettings.from_options(
        model=config.model,
        texts=[config.texts],
        budget=config.budget,
        context=config.context,
        continuation=config.continuation,
        trials=config.trials,
    )
    # This also caches the profile, so that the timed search finds it, as any but the first search of a model does.
    inputs = prepare_inputs(settings)
    windows = tuple(window.name for window in inputs.splits.search)
    task = SearchTask(inputs.profile, settings.goal, settings.context_length, windows, settings.bits)
    results: dict[str, Any] = {"benchmark": "search", "config": asdict(config), "machine": machine_info()}
    if {"overhead", "baseline"} & set(parts):
        with TemporaryDirectory(prefix="baklava-search-") as folder:
            log(f"overhead: a search of {pluralize(config.trials, 'trial')}")
            search = time_search(config, Path(folder) / "run")
            results["overhead"] = measure_overhead(search)
            if "baseline" in parts:
                results["baseline"] = compare_with_baseline(
                    search, config.baseline_trials, inputs, task, results["overhead"]["trial_seconds"]
                )
    if "scaling" in parts:
        results["scaling"] = measure_scaling(config, settings, inputs, task)
    if "dispatch" in parts:
        results["dispatch"] = measure_dispatch(config, settings, inputs, task)
    return results


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

    def log_trial(self, record: TrialRecord, plan: BudgetPlan | None, seconds: float) -> None:
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
            with WorkerGroup.for_search(settings.model, layout, inputs.splits.search, task) as workers:
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
            with WorkerGroup(actors, inputs.splits.search, task) as workers:
                rate, _ = _run_search(workers, settings, task)
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
        recorder = TrialRecorder(journal, NullTracker(), workers, task, settings.trials)
        started = time.perf_counter()
        TrialLoop(settings, task, journal, workers, recorder, WarmStart()).run()
        seconds = time.perf_counter() - started
    num_windows = sum(len(record.windows) for record in journal.records if record.twin is None)
    return len(journal.records) / seconds, num_windows / seconds


SECTION, SCALE_SECTION = "search", "scale"
"""Names of the page's markers."""

SCALE_TRIAL_SECONDS = (1, 4, 15, 60, 240)
"""Seconds of a trial on one worker for which the scale section extrapolates."""

Results = Mapping[str, Any]


def format_tables(results: Results) -> str:
    """Return a table of measurements with their aims, and one of the dispatch."""
    rows = []
    if "overhead" in results:
        rows += _overhead_rows(results["overhead"])
    if "baseline" in results:
        rows += _baseline_rows(results["baseline"])
    if "scaling" in results:
        scaling = results["scaling"]
        label = f"windows per second of two workers with {scaling['threads']} thread, over one"
        rows.append([label, f"{scaling['speedup']:.2f} ×", "≥ 1.7 ×"])
    tables = [markdown_table(["the search", "measured", "aim"], rows)] if rows else []
    if "dispatch" in results:
        tables.append(_format_dispatch(results["dispatch"]))
    return "\n\n".join(tables)


def format_scale(results: Results) -> str:
    """Return how many workers one head node keeps busy, by the time of a trial.

    The rate is the lowest one with several workers, since a single worker may be served faster.
    """
    slowest = min(results["dispatch"][1:] or results["dispatch"], key=lambda row: row["trials_per_second"])
    rate = slowest["trials_per_second"]
    cpus = results["machine"]["cpus"]
    explanation = (
        f"At its slowest, with {slowest['workers']} sleeping workers, the head finished {rate:.2f} trials per second "
        f"(on {cpus} CPUs, which it shared with the workers). A worker that takes T seconds for a trial needs a new "
        f"one every T seconds, so the head keeps {rate:.2f} × T workers busy:"
    )
    reach = markdown_table(
        ["seconds of a trial on one worker", *map(str, SCALE_TRIAL_SECONDS)],
        [["workers that one head keeps busy", *(f"{rate * seconds:.0f}" for seconds in SCALE_TRIAL_SECONDS)]],
    )
    return "\n\n".join([_format_dispatch(results["dispatch"]), explanation, reach])


def _overhead_rows(overhead: Results) -> list[list[str]]:
    trials = f"{overhead['trials']} trials on {overhead['workers']} workers"
    return [
        [f"wall time of {trials}, over scoring time / workers", f"{overhead['overhead']:.2f} ×", "≤ 1.25 ×"],
        [
            "start of the script to first trial, model and profile cached",
            f"{overhead['first_trial_starts']:.0f} s",
            "≤ 20 s",
        ],
        ["start of the script to end of first trial", f"{overhead['first_trial_ends']:.0f} s", ""],
    ]


def _baseline_rows(baseline: Results) -> list[list[str]]:
    rows = []
    for mode, description in (("token_by_token", "token by token"), ("one_forward", "continuations in one forward")):
        result = baseline[mode]
        difference = f"scores differ by at most {result['max_nll_difference']:.1g} nats"
        label = f"trials per hour over one process per trial, {description}, full-cache pass not counted ({difference})"
        rows.append([label, f"{result['speedup']:.1f} ×", "≥ 8 ×"])
        rows.append(["the same per scored window, without pruning", f"{result['speedup_per_window']:.1f} ×", ""])
    return rows


def _format_dispatch(rows: Sequence[Results]) -> str:
    return markdown_table(
        ["workers that sleep instead of scoring", *(str(row["workers"]) for row in rows)],
        [
            ["trials per second", *(f"{row['trials_per_second']:.2f}" for row in rows)],
            ["upper bound from the sleeps alone", *(f"{row['ideal_trials_per_second']:.0f}" for row in rows)],
        ],
    )
