"""The record in MLflow: a parent run per evaluation, a child per plan."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from baklava.console import log
from baklava.errors import UserError
from baklava.evaluation.results import METRICS, Evaluation
from baklava.serialization import atomic_write_text
from tuning.evaluation.run_dir import EvaluationSettings, Folder
from tuning.tracking.client import PARENT_TAG, WRITE_ERRORS, connect, first_line, now


def write_runs(evaluations: Sequence[Evaluation], settings: EvaluationSettings, folder: Folder) -> None:
    """Write a finished evaluation, once; a server that is down is told and loses nothing, since the folder has it."""
    if folder.recorded.exists():
        return
    try:
        client, experiment = connect(f"baklava/{settings.model_name}")
        tags = {"baklava.out": str(folder.path.absolute()), "baklava.kind": "evaluation"}
        parent = client.create_run(experiment, run_name=folder.path.name, tags=tags).info.run_id
        with _ended(client, parent):
            client.log_batch(parent, params=_params(settings))
            for path in (folder.report, folder.scores):
                client.log_artifact(parent, str(path))
            for evaluation in evaluations:
                _child(client, experiment, parent, evaluation)
        atomic_write_text(folder.recorded, parent + "\n")
    except (*WRITE_ERRORS, UserError) as error:
        log(f"mlflow: this evaluation is missing there ({first_line(error)}); {folder.path} has all of it")


@contextmanager
def _ended(client: MlflowClient, run: str) -> Iterator[None]:
    """Ends the run, as failed where something could not be written."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    finally:
        with suppress(*WRITE_ERRORS):
            client.set_terminated(run, status)


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """The figures of one plan by the names that MLflow shows."""
    plan = evaluation.named.plan
    found: dict[str, float] = {"ratio": plan.ratio, "allocated_bytes": evaluation.allocated_bytes}
    found |= {metric: evaluation.mean(metric).mean for metric in METRICS}
    for task, score in evaluation.tasks.items():
        # MLflow takes letters, digits, dots, slashes, dashes and underscores.
        name = task.replace("@", "/").replace(":", "/")
        found |= {f"{name}/exact": score.exact, f"{name}/answer_nll": score.nll, f"{name}/loss": score.loss.mean}
    if speed := evaluation.speed:
        found |= {"decode_ratio": speed.decode_ratio, "prefill_ratio": speed.prefill_ratio}
    return found


def _child(client: MlflowClient, experiment: str, parent: str, evaluation: Evaluation) -> None:
    name, plan = evaluation.named.name, evaluation.named.plan
    run = client.create_run(experiment, tags={PARENT_TAG: parent}, run_name=name).info.run_id
    at = now()
    params = [Param("plan", name), Param("digest", plan.digest), Param("eviction", plan.eviction.method)]
    client.log_batch(run, [Metric(key, value, at, 0) for key, value in metrics(evaluation).items()], params)
    client.log_text(run, plan.model_dump_json(indent=1), "plan.json")
    client.set_terminated(run)


def _params(settings: EvaluationSettings) -> list[Param]:
    return [Param(key, str(value)) for key, value in settings.model_dump().items()]
