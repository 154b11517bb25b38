"""All that is measured of the search, one thing after the other."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from baklava.console import log
from baklava.errors import UserError
from baklava.evaluation.speed.timing import machine_info
from benchmarks.search.baseline import against
from benchmarks.search.config import Asked
from benchmarks.search.scaling import dispatch, scaling
from benchmarks.search.startup import overhead, search
from tuning.search.inputs import SearchInputs, prepare_inputs
from tuning.study.search_space import SearchTask
from tuning.study.settings import SearchSettings

PARTS = ("overhead", "naive", "replicas", "dispatch")
"""The search as a script, next to the naive way, with one replica and two, and without any scoring."""


def study(asked: Asked, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """The figures of these parts; the naive way needs the search as a script, and brings it.

    Raises:
        UserError: an unknown part, or a search that cannot be run.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UserError(f"--parts {unknown[0]}: no such part; take some of {', '.join(PARTS)}")
    settings = SearchSettings.from_options(
        model=asked.model,
        texts=[asked.texts],
        budget=asked.budget,
        context=asked.context,
        continuation=asked.continuation,
        trials=asked.trials,
    )
    material = prepare_inputs(settings)  # also so that the timed search finds the profile cached, as a second search does
    task = task_of(settings, material)
    found: dict[str, Any] = {"benchmark": "search", "asked": asdict(asked), "machine": machine_info()}
    if {"overhead", "naive"} & set(parts):
        found |= _script(asked, "naive" in parts, material, task)
    if "replicas" in parts:
        found["replicas"] = scaling(asked, settings, material, task)
    if "dispatch" in parts:
        found["dispatch"] = dispatch(asked, settings, material, task)
    return found


def task_of(settings: SearchSettings, material: SearchInputs) -> SearchTask:
    """The task of a search on this material."""
    windows = tuple(window.name for window in material.splits.search)
    return SearchTask(material.profile, settings.goal, settings.context_length, windows, settings.bits)


def _script(asked: Asked, naive: bool, material: SearchInputs, task: SearchTask) -> dict[str, Any]:
    with TemporaryDirectory(prefix="baklava-search-") as folder:
        log(f"overhead: a search of {asked.trials} trials")
        ran = search(asked, Path(folder) / "run")
        figures: dict[str, Any] = {"overhead": overhead(ran)}
        if naive:
            figures["naive"] = against(ran, asked.naive, material, task, figures["overhead"]["trial_seconds"])
    return figures
