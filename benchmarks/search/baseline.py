"""The baseline of a search: one process per trial, which loads the model and feeds every window through the cache.

python -m benchmarks.search.baseline MODEL PLAN WINDOWS STEP scores the windows of a JSON file under a plan, with STEP
tokens of a continuation per forward: 1 is how a plan is served, the continuation's length is the fastest possible. It
prints {"seconds", "scores": [{"window", "nll", "kl"}], "reference_seconds"}; the last is the time of the full cache,
which KL needs and perplexity does not.
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
from benchmarks.search.timed_search import TimedSearch
from tuning.search.inputs import SearchInputs
from tuning.study.search_space import SearchTask
from tuning.study.trial import TrialRecord, finished_trials

Ids = Int[Tensor, "1 tokens"]
LogProbs = Float[Tensor, "tokens vocabulary"]

ROOT = Path(__file__).parents[2]


def compare_with_baseline(
    search: TimedSearch, num_trials: int, inputs: SearchInputs, task: SearchTask, trial_seconds: float
) -> dict[str, Any]:
    """Repeat the first complete trials of a search in one process each, and compare trials per hour and scores.

    The search's trials per hour include its pruned trials; "speedup_per_window" compares without their advantage. The
    continuations are fed token by token, and once more in one forward. The baseline's time excludes the full cache,
    which a search for perplexity does not need.
    """
    records = finished_trials(search.trials)[:num_trials]
    windows = inputs.splits.search
    num_scored_windows = sum(len(record.windows) for record in search.trials if record.twin is None)
    seconds_per_trial = trial_seconds / len(search.trials)
    seconds_per_window = trial_seconds / num_scored_windows
    results: dict[str, Any] = {"trials": len(records), "search_trials_per_hour": 3600 / seconds_per_trial}
    with progress_bar(len(records) * 2, "baseline", "trials") as progress:
        for mode, step in (("token_by_token", 1), ("one_forward", max(len(window.ids) for window in windows))):
            runs = []
            for record in records:
                runs.append(_run_trial(search.out, record, task, windows, step))
                progress.update(1)
            reference_seconds = sum(run["reference_seconds"] for run in runs) / len(runs)
            seconds = sum(run["seconds"] for run in runs) / len(runs) - reference_seconds
            results[mode] = {
                "seconds_per_trial": seconds,
                "reference_seconds": reference_seconds,
                "speedup": seconds / seconds_per_trial,
                "speedup_per_window": seconds / len(windows) / seconds_per_window,
                **_max_differences(records, runs),
            }
    return results


def _run_trial(
    folder: Path, record: TrialRecord, task: SearchTask, windows: Sequence[Window], step: int
) -> dict[str, Any]:
    plan_file = folder / "baseline-plan.json"
    windows_file = folder / "baseline-windows.json"
    task.plan(record.params).write(plan_file)
    windows_file.write_text(json.dumps([asdict(window) for window in windows]))
    arguments = [task.profile.model.id, str(plan_file), str(windows_file), str(step)]
    command = [sys.executable, "-m", "benchmarks.search.baseline", *arguments]
    started = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        last_line = (result.stderr.strip().splitlines() or ["it logged nothing"])[-1]
        raise UserError(f"a trial of the baseline failed: {last_line}")
    return json.loads(result.stdout.splitlines()[-1]) | {"seconds": time.perf_counter() - started}


def _max_differences(records: Sequence[TrialRecord], runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the largest difference of a window's NLL, and of its KL, between the search and the baseline."""
    pairs = []
    for record, run in zip(records, runs, strict=True):
        by_window = {score["window"]: score for score in run["scores"]}
        pairs += [(score, by_window[score["window"]]) for score in record.windows]
    return {
        f"max_{metric}_difference": max(abs(score[metric] - baseline[metric]) for score, baseline in pairs)
        for metric in ("nll", "kl")
    }


@torch.inference_mode()
def score_window(loaded: LoadedModel, plan: BudgetPlan, window: Window, step: int) -> dict[str, Any]:
    """Return NLL and KL of the continuation in nats per token; the window is prefilled again for the full cache."""
    started = time.perf_counter()
    ids = torch.tensor([window.ids], device=loaded.device)
    full_cache = DynamicCache()
    logits = loaded.model(ids[:, : window.context_length], past_key_values=full_cache, logits_to_keep=1).logits[:, -1]
    reference = _continue_from(loaded, ids, window.context_length, step, full_cache, logits)
    reference_seconds = time.perf_counter() - started
    cache, logits = prefill(loaded, plan, ids[:, : window.context_length])
    with cache.teacher_forcing() if step > 1 else nullcontext():
        log_probs = _continue_from(loaded, ids, window.context_length, step, cache, logits)
    nll = -log_probs.gather(-1, ids[0, window.context_length :, None]).mean()
    kl = (reference.exp() * (reference - log_probs)).sum(-1).mean()
    return {"window": window.name, "nll": float(nll), "kl": float(kl), "reference_seconds": reference_seconds}


def _continue_from(loaded: LoadedModel, ids: Ids, context: int, step: int, cache: Any, logits: Tensor) -> LogProbs:
    """Return the log-probabilities of the tokens after the context, from forwards of `step` tokens each."""
    rows = [logits]
    last = ids.shape[1] - 1
    for start in range(context, last, step):
        rows.append(loaded.model(ids[:, start : min(start + step, last)], past_key_values=cache).logits[0])
    return torch.log_softmax(torch.cat(rows).float(), -1)


def main(arguments: Sequence[str]) -> None:
    """Score the windows of a file under the plan of another, and print the scores."""
    model, plan_file, windows_file, step = arguments
    started = time.perf_counter()
    loaded = load(model)
    plan = BudgetPlan.read(plan_file)
    windows = [Window(**{**entry, "ids": tuple(entry["ids"])}) for entry in json.loads(Path(windows_file).read_text())]
    scores = [score_window(loaded, plan, window, int(step)) for window in windows]
    reference_seconds = sum(score["reference_seconds"] for score in scores)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "scores": scores, "reference_seconds": reference_seconds}))


if __name__ == "__main__":
    main(sys.argv[1:])
