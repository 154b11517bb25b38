"""Run the search benchmark, one part after the other."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from baklava.console import log
from baklava.errors import UserError
from baklava.evaluation.intervals import pluralize
from baklava.evaluation.speed import machine_info
from benchmarks.search.baseline import compare_with_baseline
from benchmarks.search.config import SearchBenchmarkConfig
from benchmarks.search.scaling import measure_dispatch, measure_scaling
from benchmarks.search.startup import measure_overhead, time_search
from tuning.search.inputs import prepare_inputs
from tuning.study.search_space import SearchTask
from tuning.study.settings import SearchSettings

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
