"""The naive way: a process per trial, which loads the model and feeds every window through the cache.

python -m benchmarks.search.baseline MODEL PLAN WINDOWS STEP feeds STEP tokens of a continuation per forward (1 is how
it is served; as many as there are is the least that can be done) and prints {"seconds", "scores": [{"window", "nll",
"kl"}], "reference_seconds"}. The last are those of the full cache, which a KL needs and a perplexity does not.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from baklava.console import progress_bar
from baklava.data.windows import Window
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel, load
from baklava.runtime.prefill import prefill
from benchmarks.search.startup import Ran
from tuning.search.inputs import SearchInputs
from tuning.study.search_space import SearchTask
from tuning.study.trial import TrialRecord, finished_trials

Ids = Int[Tensor, "1 tokens"]
LogProbs = Float[Tensor, "tokens vocabulary"]


@torch.inference_mode()
def score(loaded: LoadedModel, plan: BudgetPlan, window: Window, step: int) -> dict[str, Any]:
    """NLL of the continuation, in nats per token, and KL to the full cache, which is prefilled once more for that."""
    started, ids = time.perf_counter(), torch.tensor([window.ids], device=loaded.device)
    full = DynamicCache()
    logits = loaded.model(ids[:, : window.context_length], past_key_values=full, logits_to_keep=1).logits[:, -1]
    reference = _stepped(loaded, ids, window.context_length, step, full, logits)
    referred = time.perf_counter() - started
    cache, logits = prefill(loaded, plan, ids[:, : window.context_length])
    with cache.teacher_forcing() if step > 1 else nullcontext():
        found = _stepped(loaded, ids, window.context_length, step, cache, logits)
    nll = -found.gather(-1, ids[0, window.context_length :, None]).mean()
    kl = (reference.exp() * (reference - found)).sum(-1).mean()
    return {"window": window.name, "nll": float(nll), "kl": float(kl), "reference_seconds": referred}


def _stepped(loaded: LoadedModel, ids: Ids, context: int, step: int, cache: Any, logits: Tensor) -> LogProbs:
    """Log-probabilities of all tokens behind the context, `step` of them from one forward of the tokens before."""
    rows, last = [logits], ids.shape[1] - 1
    for start in range(context, last, step):
        rows.append(loaded.model(ids[:, start : min(start + step, last)], past_key_values=cache).logits[0])
    return torch.log_softmax(torch.cat(rows).float(), -1)


def main(arguments: Sequence[str]) -> None:
    """Score the windows of a file with the plan of another."""
    model, plan_file, windows_file, step = arguments
    started = time.perf_counter()
    loaded, plan = load(model), BudgetPlan.read(plan_file)
    windows = [Window(**{**each, "ids": tuple(each["ids"])}) for each in json.loads(Path(windows_file).read_text())]
    scores = [score(loaded, plan, window, int(step)) for window in windows]
    referred = sum(each["reference_seconds"] for each in scores)
    print(json.dumps({"seconds": time.perf_counter() - started, "scores": scores, "reference_seconds": referred}))


if __name__ == "__main__":
    main(sys.argv[1:])


ROOT = Path(__file__).parents[2]


def against(ran: Ran, count: int, material: SearchInputs, task: SearchTask, trial_seconds: float) -> dict[str, Any]:
    """The first trials that scored every window, naively: trials per hour of both ways, and how far scores differ.

    The search's trials per hour are those of all its trials, the stopped ones included; per window both ways compare
    without that. Naively, continuations go in token by token, and once more in one forward each; the full cache's part
    of it, which a search for perplexity could leave out, is not counted.
    """
    records, windows = finished_trials(ran.trials)[:count], material.splits.search
    per_trial, per_window = (trial_seconds / each for each in (len(ran.trials), _scored(ran.trials)))
    found: dict[str, Any] = {"trials": len(records), "search_per_hour": 3600 / per_trial}
    with progress_bar(len(records) * 2, "naive trials", "trials") as progress:
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


def _naively(folder: Path, record: TrialRecord, task: SearchTask, windows: Sequence[Window], step: int) -> dict[str, Any]:
    plan, file = folder / "naive-plan.json", folder / "naive-windows.json"
    task.plan(record.params).write(plan)
    file.write_text(json.dumps([asdict(window) for window in windows]))
    command = [
        sys.executable,
        "-m",
        "benchmarks.search.baseline",
        task.profile.model.id,
        str(plan),
        str(file),
        str(step),
    ]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise UserError(f"a naive trial failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds": time.perf_counter() - started}


def _pairs(record: TrialRecord, run: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    by_window = {score["window"]: score for score in run["scores"]}
    return [(score, by_window[score["window"]]) for score in record.windows]
