"""An evaluation from its settings to a report."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baklava.console import log, progress_bar
from baklava.evaluation.results import Evaluation, aggregate_results
from baklava.evaluation.speed import Speed, measure_speeds
from baklava.runtime.model_loader import LoadedModel, load, load_config
from tuning.evaluation.inputs import prepare_inputs
from tuning.evaluation.mlflow_runs import log_evaluation
from tuning.evaluation.report import write_report
from tuning.evaluation.run_dir import (
    EvaluationDir,
    EvaluationInputs,
    EvaluationRecord,
    EvaluationSettings,
    in_item_order,
)
from tuning.evaluation.workers import evaluate_items
from tuning.study.journal import check_new_run_dir, disk_errors_as_user_errors
from tuning.tracking.client import connect, now_ms

MIN_CONTEXT_TOKENS = 32
"""Tokens that a plan must be made for so that its speed can be measured."""


@dataclass(frozen=True)
class EvaluationResult:
    """A finished evaluation."""

    run_dir: EvaluationDir
    settings: EvaluationSettings
    evaluations: tuple[Evaluation, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the scores of one plan, or of several under "plans"; scripts of others read them."""
        if len(self.evaluations) == 1:
            return self.evaluations[0].as_json()
        return {"plans": [evaluation.as_json() for evaluation in self.evaluations]}


def evaluate(settings: EvaluationSettings, out: Path) -> EvaluationResult:
    """Compare plans on windows and prompts; write everything into the new folder `out`.

    Raises:
        UserError: anything that a user can correct; nothing has been written to `out` then.
    """
    started_ms = now_ms()
    check_new_run_dir(out, "evaluation")
    load_config(settings.model)
    connect(f"baklava/{settings.model_name}")  # fail now if the server is down, not after half an hour
    loaded = load(settings.model, threads=settings.threads)
    inputs = prepare_inputs(settings, loaded)
    run_dir = EvaluationDir(out)
    record = EvaluationRecord(settings=settings, weights=loaded.weights_digest, started_ms=started_ms)
    with disk_errors_as_user_errors(out):
        run_dir.write_inputs(record, inputs)
    return _run(run_dir, record, loaded, inputs)


def resume(out: Path) -> EvaluationResult:
    """Continue an evaluation that was killed, from the results that it recorded.

    Raises:
        UserError: no evaluation there, or its model has changed since.
    """
    run_dir = EvaluationDir(out)
    record = run_dir.read_record()
    loaded = load(record.settings.model, threads=record.settings.threads)
    record.check_unchanged(loaded)
    inputs = run_dir.read_inputs(record.settings, loaded.num_embeddings)
    return _run(run_dir, record, loaded, inputs)


def _run(
    run_dir: EvaluationDir,
    record: EvaluationRecord,
    loaded: LoadedModel,
    inputs: EvaluationInputs,
) -> EvaluationResult:
    settings = record.settings
    try:
        results = _evaluate_missing(run_dir, settings, loaded, inputs)
        speeds = _speeds(run_dir, loaded, inputs) if settings.speed else {}
    except BaseException:
        log(f"the evaluation ended early; resume it with: baklava-evaluate --resume {run_dir.path}")
        raise
    windows = in_item_order(results, [("window", window.name) for window in inputs.windows])
    prompts = in_item_order(results, [("prompt", prompt.prompt.name) for prompt in inputs.prompts])
    result = EvaluationResult(run_dir, settings, tuple(aggregate_results(inputs.plans, windows, prompts, speeds)))
    with disk_errors_as_user_errors(run_dir.path):
        write_report(result.evaluations, settings, run_dir.report_path)
        run_dir.write_scores(result.as_json())
    log_evaluation(result.evaluations, record, run_dir)
    return result


def _evaluate_missing(
    run_dir: EvaluationDir, settings: EvaluationSettings, loaded: LoadedModel, inputs: EvaluationInputs
) -> list[Any]:
    """All results: those in the journal, and those of the remaining items."""
    journal = run_dir.open_journal()
    done = {(result.kind, result.name) for result in journal.records}
    missing = [item for key, item in inputs.items if key not in done]
    counts = f"{len(inputs.windows)} windows and {len(inputs.prompts)} prompts"
    log(f"evaluating {len(inputs.plans)} plans on {counts}, {len(done)} of them done before")
    with progress_bar(len(missing), "evaluating", "items") as progress:
        for result in evaluate_items(loaded, inputs, missing, settings.replicas):
            journal.append(result)
            progress.set_postfix_str(result.name)
            progress.update(1)
    return journal.records


def _speeds(run_dir: EvaluationDir, loaded: LoadedModel, inputs: EvaluationInputs) -> Mapping[str, Speed]:
    recorded = run_dir.read_speeds()
    if recorded is not None:
        return recorded
    if inputs.min_context_length <= MIN_CONTEXT_TOKENS:
        log(f"speed is left out: plans for {inputs.min_context_length} tokens are too short to time")
        return {}
    log("measuring speed and peak memory, all plans in turns")
    speeds = measure_speeds(loaded, inputs.plans)
    run_dir.write_speeds(speeds)
    return speeds
