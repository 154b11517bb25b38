"""Sizes of the search benchmark, and a search as users run it: a process that is timed from outside by its log."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baklava.errors import UserError
from tuning.study.journal import Journal
from tuning.study.trial import TRIALS_FILE, TrialRecord


@dataclass(frozen=True)
class SearchBenchmarkConfig:
    """What is searched, and at which size.

    Attributes:
        context: tokens prefilled per window.
        continuation: tokens scored per window.
        trials: of the search that is timed as a script.
        baseline_trials: how many of them are repeated with one process per trial.
        scaling_trials: trials of each search with one and with two workers.
        dispatch_workers: numbers of sleeping workers.
        dispatch_trials: trials of each search with sleeping workers.
        sleep_seconds: what a sleeping worker takes for a window.
        budget: the searched plan's share of the full cache's bytes.
    """

    model: str = "demo"
    texts: str = "botocore"
    context: int = 3072
    continuation: int = 512
    trials: int = 32
    baseline_trials: int = 1
    scaling_trials: int = 16
    dispatch_workers: tuple[int, ...] = (1, 2, 4, 8, 16)
    dispatch_trials: int = 48
    sleep_seconds: float = 0.05
    budget: float = 0.3


def quick_config(model: str = "demo", texts: str = "botocore") -> SearchBenchmarkConfig:
    """Return sizes that show that the benchmark runs; their results mean nothing."""
    return SearchBenchmarkConfig(
        model,
        texts,
        context=256,
        continuation=32,
        trials=6,
        scaling_trials=6,
        dispatch_workers=(1, 2),
        dispatch_trials=8,
        sleep_seconds=0.01,
    )


SEARCH_SCRIPT = Path(__file__).parents[2] / "jobs/search.py"


@dataclass(frozen=True)
class TimedSearch:
    """A finished search: its trials, and its log lines with the seconds since its start."""

    out: Path
    trials: tuple[TrialRecord, ...]
    log_lines: tuple[tuple[float, str], ...]

    def seconds_until(self, prefix: str) -> float:
        """Return the seconds until the first line that starts with `prefix`."""
        return next(seconds for seconds, line in self.log_lines if line.startswith(prefix))

    @property
    def num_workers(self) -> int:
        """How many workers started."""
        line = next(line for _, line in self.log_lines if line.startswith("starting replicas"))
        return int(line.split("/")[1].split()[0])


def time_search(config: SearchBenchmarkConfig, out: Path) -> TimedSearch:
    """Run jobs/search.py; raise UserError with its last line if it fails."""
    options = {
        "--model": config.model,
        "--texts": config.texts,
        "--budget": config.budget,
        "--context": config.context,
        "--continuation": config.continuation,
        "--trials": config.trials,
        "--out": out,
    }
    command = [sys.executable, str(SEARCH_SCRIPT), *(str(part) for option in options.items() for part in option)]
    started = time.perf_counter()
    log_lines = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr or ():
            log_lines.append((time.perf_counter() - started, line.strip()))
    if process.returncode:
        raise UserError(f"the timed search failed: {log_lines[-1][1] if log_lines else 'it logged nothing'}")
    log_lines.append((time.perf_counter() - started, "ended"))
    trials = Journal.read(out / TRIALS_FILE, TrialRecord.model_validate_json)
    return TimedSearch(out, tuple(trials), tuple(log_lines))


def measure_overhead(search: TimedSearch) -> dict[str, Any]:
    """Return the wall time of the trials over their scoring time divided by the workers; 1 means no overhead."""
    first = search.seconds_until("trials: the first")
    last = search.seconds_until(f"trial {len(search.trials)} of")
    scored = [record for record in search.trials if record.twin is None]
    scoring_seconds = sum(record.metrics.get("seconds", 0.0) for record in scored)
    return {
        "trials": len(search.trials),
        "windows": sum(len(record.windows) for record in scored),
        "workers": search.num_workers,
        "trial_seconds": last - first,
        "scoring_seconds": scoring_seconds,
        "overhead": (last - first) / (scoring_seconds / search.num_workers),
        "search_seconds": search.seconds_until("ended"),
        "first_trial_starts": first,
        "first_trial_ends": search.seconds_until("trial 1 of"),
    }
