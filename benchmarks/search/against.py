"""Trials of a search, once more in the naive way."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from baklava.errors import UserError
from baklava.progress import bar
from baklava.windows import Window
from benchmarks.search.script import Ran
from tuning.prepare import Material
from tuning.task import Task
from tuning.trials import TrialRecord, finished

ROOT = Path(__file__).parents[2]


def against(ran: Ran, count: int, material: Material, task: Task, trial_seconds: float) -> dict[str, Any]:
    """The first trials that scored every window, naively: trials per hour of both ways, and how far scores differ.

    The search's trials per hour are those of all its trials, the stopped ones included; per window both ways compare
    without that. Naively, continuations go in token by token, and once more in one forward each; the full cache's part
    of it, which a search for perplexity could leave out, is not counted.
    """
    records, windows = finished(ran.trials)[:count], material.splits.search
    per_trial, per_window = (trial_seconds / each for each in (len(ran.trials), _scored(ran.trials)))
    found: dict[str, Any] = {"trials": len(records), "search_per_hour": 3600 / per_trial}
    with bar(len(records) * 2, "naive trials", "trials") as progress:
        for way, step in (("stepped", 1), ("at_once", max(len(window.ids) for window in windows))):
            runs = []
            for record in records:
                runs.append(_naively(ran.out, record, task, windows, step))
                progress.update(1)
            seconds = sum(run["seconds"] - run["reference_seconds"] for run in runs) / len(runs)
            ratios = {"times": seconds / per_trial, "times_per_window": seconds / len(windows) / per_window}
            reference = sum(run["reference_seconds"] for run in runs) / len(runs)
            apart = _apart(records, runs)
            found[way] = {"seconds_per_trial": seconds, "reference_seconds": reference, **ratios, **apart}
    return found


def _scored(trials: Sequence[TrialRecord]) -> int:
    return sum(len(record.windows) for record in trials if record.twin is None)


def _apart(records: Sequence[TrialRecord], runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The largest difference of a window's scores."""
    scores = [(ours, other) for record, run in zip(records, runs, strict=True) for ours, other in _pairs(record, run)]
    return {f"{name}_apart": max(abs(ours[name] - other[name]) for ours, other in scores) for name in ("nll", "kl")}


def _naively(folder: Path, record: TrialRecord, task: Task, windows: Sequence[Window], step: int) -> dict[str, Any]:
    plan, file = folder / "naive-plan.json", folder / "naive-windows.json"
    task.plan(record.params).write(plan)
    file.write_text(json.dumps([asdict(window) for window in windows]))
    command = [sys.executable, "-m", "benchmarks.search.naive", task.profile.model.id, str(plan), str(file), str(step)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise UserError(f"a naive trial failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds": time.perf_counter() - started}


def _pairs(record: TrialRecord, run: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    by_window = {score["window"]: score for score in run["scores"]}
    return [(score, by_window[score["window"]]) for score in record.windows]
