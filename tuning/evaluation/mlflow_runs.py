"""An evaluation in MLflow: a parent run, and a child run per plan."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from baklava.console import log
from baklava.errors import UserError
from baklava.evaluation.results import WINDOW_METRICS, Evaluation
from baklava.plan.registry import error_summary
from baklava.serialization import atomic_write_text
from tuning.evaluation.run_dir import EvaluationDir, EvaluationRecord
from tuning.tracking.client import PARENT_TAG, TRACKING_ERRORS, connect, now_ms, source_tags


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
