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
    without that.
    """
    records = finished(ran.trials)[:count]
    with bar(len(records), "naive trials", "trials") as progress:
        runs = []
        for record in records:
            runs.append(_naively(ran.out, record, task, material.splits.search))
            progress.update(1)
    seconds = sum(run["seconds"] for run in runs) / len(runs)
    windows = sum(len(record.windows) for record in ran.trials if record.twin is None)
    scores = [(ours, other) for record, run in zip(records, runs, strict=True) for ours, other in _pairs(record, run)]
    return {
        "trials": len(records),
        "seconds_per_trial": seconds,
        "naive_per_hour": 3600 / seconds,
        "search_per_hour": 3600 * len(ran.trials) / trial_seconds,
        "times": len(ran.trials) / trial_seconds * seconds,
        "times_per_window": windows / trial_seconds * seconds / len(task.windows),
        "nll_apart": max(abs(ours["nll"] - other["nll"]) for ours, other in scores),
        "kl_apart": max(abs(ours["kl"] - other["kl"]) for ours, other in scores),
    }


def _naively(folder: Path, record: TrialRecord, task: Task, windows: Sequence[Window]) -> dict[str, Any]:
    plan, file = folder / "naive-plan.json", folder / "naive-windows.json"
    task.plan(record.params).write(plan)
    file.write_text(json.dumps([asdict(window) for window in windows]))
    command = [sys.executable, "-m", "benchmarks.search.naive", task.profile.model.id, str(plan), str(file)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise UserError(f"a naive trial failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    scores = json.loads(done.stdout.splitlines()[-1])["scores"]
    return {"seconds": time.perf_counter() - started, "scores": scores}


def _pairs(record: TrialRecord, run: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    by_window = {score["window"]: score for score in run["scores"]}
    return [(score, by_window[score["window"]]) for score in record.windows]
