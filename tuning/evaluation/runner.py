"""An evaluation from its settings to a report: its items on one process or on workers, and its runs in MLflow."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from baklava.allocation.plan_spec import check_plan
from baklava.console import log, progress_bar, shell_command
from baklava.data.windows import Window
from baklava.errors import UserError
from baklava.evaluation.evaluator import Evaluator, PromptResult, WindowResult
from baklava.evaluation.intervals import pluralize
from baklava.evaluation.results import WINDOW_METRICS, Evaluation, aggregate_results
from baklava.evaluation.speed import Speed, measure_speeds
from baklava.plan.budget_plan import BudgetPlan
from baklava.plan.registry import error_summary
from baklava.runtime.model_loader import LoadedModel, load, load_config
from baklava.runtime.precision import resolve_dtype
from baklava.runtime.ray_session import ray_session, starts_cluster
from baklava.serialization import atomic_write_text
from tuning.evaluation.inputs import prepare_inputs
from tuning.evaluation.report import write_report
from tuning.evaluation.run_dir import (
    RESULT,
    EvaluationDir,
    EvaluationInputs,
    EvaluationRecord,
    EvaluationSettings,
    Item,
    in_item_order,
)
from tuning.study.journal import check_new_run_dir, disk_errors_as_user_errors
from tuning.tracking.client import PARENT_TAG, TRACKING_ERRORS, connect, now_ms, source_tags
from tuning.workers.scoring_worker import ModelWorker

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
    settings = settings.model_copy(update={"dtype": resolve_dtype(settings.dtype)})
    model = load_config(settings.model)
    for spec in settings.plans:
        check_plan(spec, *model)
    connect(f"baklava/{settings.model_name}")  # fail now if the server is down, not after half an hour
    loaded = load(settings.model, dtype=settings.dtype, threads=settings.threads)
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
    loaded = load(record.settings.model, dtype=record.settings.dtype, threads=record.settings.threads)
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
        command = f"{shell_command('baklava-evaluate')} --resume {run_dir.path}"
        log(f"the evaluation ended early; resume it with: {command}")
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
    longest = max([len(inputs.windows[0].ids), *(settings.lengths if inputs.prompts else ())])
    for named in inputs.plans:
        if named.name != "full" and (warning := named.plan.length_warning(longest)):
            log(f"{named.name}: {warning}")
    counts = f"{len(inputs.windows)} windows and {len(inputs.prompts)} prompts"
    log(f"evaluating {pluralize(len(inputs.plans), 'plan')} on {counts}, {len(done)} of them done before")
    with (
        progress_bar(len(missing), "evaluating", "items") as progress,
        closing(evaluate_items(loaded, inputs, missing, settings.replicas, settings.dtype)) as results,
    ):
        for result in results:
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


def evaluate_items(
    loaded: LoadedModel,
    inputs: EvaluationInputs,
    items: Sequence[Item],
    replicas: int | str,
    dtype: str | None = None,
) -> Generator[WindowResult | PromptResult, None, None]:
    """Yield the results of all items as they come, in any order.

    With `replicas` "auto" there is one worker per GPU of the cluster at `$RAY_ADDRESS`, or of this machine if it has
    several, and otherwise only this process. Workers load the model with this `dtype`.
    """
    if not items:
        return
    plans = [named.plan for named in inputs.plans]
    has_cluster = not starts_cluster() or torch.cuda.device_count() > 1
    if replicas == 1 or (replicas == "auto" and not has_cluster):
        evaluator = Evaluator(loaded, plans)
        yield from (evaluate_item(evaluator, item) for item in items)
        return

    # Imported here, since a single process needs no Ray.
    from tuning.workers.cluster import OBJECT_STORE_BYTES, WorkerGroup, cluster_layout

    with ray_session(object_store_bytes=OBJECT_STORE_BYTES):
        layout = cluster_layout(replicas)
        log(f"evaluating on {layout.replicas} replicas with {layout.threads} threads each")
        workers = WorkerGroup.launch(
            layout,
            EvaluationWorker,
            loaded.identity.id,
            dtype=dtype,
            plans=[plan.model_dump_json() for plan in plans],
            weights_digest=loaded.weights_digest,
        )
        with workers:
            workers.wait_until_ready()
            for result in workers.map_unordered("evaluate", items):
                yield RESULT.validate_json(result)


def evaluate_item(evaluator: Evaluator, item: Item) -> WindowResult | PromptResult:
    """Return the result of one item."""
    if isinstance(item, Window):
        return evaluator.evaluate_window(item)
    return evaluator.evaluate_prompt(item.task, item.prompt)


class EvaluationWorker(ModelWorker):
    """A replica of the model with all plans. It refuses to start if its weights are not `weights_digest`."""

    def __init__(self, model: str, threads: int, *, plans: Sequence[str], **options: Any) -> None:
        super().__init__(model, threads, **options)
        self.evaluator = Evaluator(self.loaded, [BudgetPlan.model_validate_json(plan) for plan in plans])

    def evaluate(self, item: Item) -> str:
        """Return the result of one item as JSON."""
        return evaluate_item(self.evaluator, item).model_dump_json()


def log_evaluation(evaluations: Sequence[Evaluation], record: EvaluationRecord, run_dir: EvaluationDir) -> None:
    """Write a finished evaluation, once; if the server is down, only warn, since the folder has everything.

    The runs start when the evaluation did, and end now.
    """
    if run_dir.mlflow_run_path.exists():
        return
    ended_ms = now_ms()
    try:
        client, experiment = connect(f"baklava/{record.settings.model_name}")
        source = source_tags("baklava-evaluate")
        parent = client.create_run(
            experiment,
            run_name=run_dir.path.name,
            start_time=record.started_ms,
            tags={"baklava.out": str(run_dir.path.absolute()), "baklava.kind": "evaluation", **source},
        ).info.run_id
        with _terminated(client, parent, ended_ms):
            params = [Param(name, str(value)) for name, value in record.settings.model_dump().items()]
            client.log_batch(parent, params=params)
            for path in (run_dir.report_path, run_dir.scores_path):
                client.log_artifact(parent, str(path))
            for evaluation in evaluations:
                name, plan = evaluation.name, evaluation.plan
                tags = {PARENT_TAG: parent, **source}
                child = client.create_run(
                    experiment, start_time=record.started_ms, tags=tags, run_name=name
                ).info.run_id
                metrics = [Metric(name, value, ended_ms, 0) for name, value in plan_metrics(evaluation).items()]
                facts = {"plan": name, "digest": plan.digest, "eviction": plan.eviction.method}
                client.log_batch(child, metrics, [Param(name, value) for name, value in facts.items()])
                client.log_text(child, plan.model_dump_json(indent=1), "plan.json")
                client.set_terminated(child, end_time=ended_ms)
        atomic_write_text(run_dir.mlflow_run_path, parent + "\n")
    except (*TRACKING_ERRORS, UserError) as error:
        log(f"mlflow: this evaluation is missing there ({error_summary(error)}); {run_dir.path} has all of it")


def plan_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Return the metrics of one plan by the names that MLflow shows."""
    plan = evaluation.plan
    metrics: dict[str, float] = {"ratio": plan.ratio, "allocated_bytes": evaluation.allocated_bytes}
    metrics |= {name: evaluation.mean(name).mean for name in WINDOW_METRICS}
    for task, score in evaluation.tasks.items():
        # MLflow accepts letters, digits, dots, slashes, dashes and underscores.
        name = task.replace("@", "/").replace(":", "/")
        metrics |= {f"{name}/score": score.score, f"{name}/answer_nll": score.nll, f"{name}/loss": score.loss.mean}
    if speed := evaluation.speed:
        metrics |= {"decode_ratio": speed.decode_ratio, "prefill_ratio": speed.prefill_ratio}
    return metrics


@contextmanager
def _terminated(client: MlflowClient, run: str, ended_ms: int) -> Iterator[None]:
    """End the run after the block, as failed if something could not be written."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    finally:
        with suppress(*TRACKING_ERRORS):
            client.set_terminated(run, status, end_time=ended_ms)
