"""A search as people run it: a process, timed from outside by what it says."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baklava.errors import UserError
from benchmarks.search.config import Asked
from tuning.study.journal import Journal
from tuning.study.trial import TRIALS_FILE, TrialRecord

JOB = Path(__file__).parents[2] / "jobs/search.py"


@dataclass(frozen=True)
class Ran:
    """A finished search: its trials, and seconds from its start until what its log says."""

    out: Path
    trials: tuple[TrialRecord, ...]
    said: tuple[tuple[float, str], ...]

    def when(self, start: str) -> float:
        """Seconds until the first line that begins so."""
        return next(seconds for seconds, line in self.said if line.startswith(start))

    @property
    def replicas(self) -> int:
        """How many replicas started."""
        return int(next(line for _, line in self.said if line.startswith("starting replicas")).split("/")[1].split()[0])


def search(asked: Asked, out: Path) -> Ran:
    """Run jobs/search.py; raises UserError with its last line where it fails."""
    sizes = ["--context", asked.context, "--continuation", asked.continuation, "--trials", asked.trials]
    named = ["--model", asked.model, "--texts", asked.texts, "--budget", asked.budget, "--out", out]
    command = [sys.executable, str(JOB), *map(str, [*named, *sizes])]
    started, said = time.perf_counter(), []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr or ():
            said.append((time.perf_counter() - started, line.strip()))
    if process.returncode:
        raise UserError(f"the search that was to be timed failed: {said[-1][1] if said else 'it said nothing'}")
    said.append((time.perf_counter() - started, "ended"))
    return Ran(out, tuple(Journal.read(out / TRIALS_FILE, TrialRecord.model_validate_json)), tuple(said))


def overhead(ran: Ran) -> dict[str, Any]:
    """Seconds of the trials over what their scores took, shared out over the replicas; 1 is no overhead at all."""
    first, last = ran.when("trials: the first"), ran.when(f"trial {len(ran.trials)} of")
    scored = sum(record.metrics.get("seconds", 0.0) for record in ran.trials if record.twin is None)
    return {
        "trials": len(ran.trials),
        "windows": sum(len(record.windows) for record in ran.trials if record.twin is None),
        "replicas": ran.replicas,
        "trial_seconds": last - first,
        "scoring_seconds": scored,
        "overhead": (last - first) / (scored / ran.replicas),
        "search_seconds": ran.when("ended"),
        "first_trial_starts": first,
        "first_trial_ends": ran.when("trial 1 of"),
    }
