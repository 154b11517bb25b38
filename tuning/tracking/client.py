"""A client of the MLflow server that touches no global state of MLflow, and errors that a user understands."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from sqlalchemy.exc import SQLAlchemyError

from baklava.console import log
from baklava.errors import UserError
from baklava.paths import check_data_dir, check_temp_dir, data_dir, reason_of, tracking_uri
from baklava.plan.registry import (
    LOG_LEVELS,
    error_summary,
    explain_tracking_error,
    tracking_database,
    tracking_place,
    without_password,
)

PARENT_TAG = "mlflow.parentRunId"

VERSION_TAG = "baklava.version"
"""Tag of an experiment: the last version that wrote to it."""

TRACKING_ERRORS = (MlflowException, SQLAlchemyError, OSError)
"""What is raised if the server is down, full or out of reach."""


def connect(experiment: str) -> tuple[MlflowClient, str]:
    """Return a client of a server that takes runs and files, and the id of the experiment with this name.

    Raises:
        UserError: the server does not answer or refuses something, or the experiment was deleted.
    """
    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    log(f"mlflow: opening {without_password(tracking_uri())}")
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        check_data_dir()
    check_temp_dir()
    with tracking_errors_as_user_errors():
        if database := tracking_database():
            database.parent.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(tracking_uri=tracking_uri())
        found = _experiment(client, experiment)
        _check_takes_results(client, found)
        return client, str(found.experiment_id)


@contextmanager
def tracking_errors_as_user_errors() -> Iterator[None]:
    """Turn errors of the server inside the block into a UserError with what helps."""
    try:
        yield
    except (*TRACKING_ERRORS, ImportError) as error:
        reason, remedy = explain_tracking_error(error)
        raise UserError(f"{tracking_place()} cannot be used: {reason}; {remedy}") from None


def is_invalid_parameter(error: Exception) -> bool:
    """Return whether the server answered that it does not accept a value."""
    return isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE"


def source_tags(command: str) -> dict[str, str]:
    """Return the tags that MLflow shows as a run's source: the command that made it."""
    return {"mlflow.source.name": command, "mlflow.source.type": "LOCAL"}


def now_ms() -> int:
    """Return the time in milliseconds, MLflow's unit."""
    return int(time.time() * 1000)


def _experiment(client: MlflowClient, name: str) -> Experiment:
    """The experiment of this name, which is created if there is none; raises UserError if it was deleted."""
    found = client.get_experiment_by_name(name)
    if found is None:
        is_local = not os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = (data_dir() / "mlartifacts").as_uri() if is_local else None
        found = client.get_experiment(client.create_experiment(name, artifact_location=artifacts))
    if found.lifecycle_stage != LifecycleStage.ACTIVE:
        where = "" if os.environ.get("MLFLOW_TRACKING_URI") else f"MLFLOW_TRACKING_URI={tracking_uri()} "
        raise UserError(
            f"the experiment {name} was deleted from {tracking_place()}; restore it with: "
            f"{where}mlflow experiments restore -x {found.experiment_id}"
        )
    return found


def _check_takes_results(client: MlflowClient, experiment: Experiment) -> None:
    """Write to the database, and write a file and delete it again, so that a refusal comes before the work."""
    client.set_experiment_tag(experiment.experiment_id, VERSION_TAG, version("baklava"))
    place = experiment.artifact_location
    try:
        with TemporaryDirectory() as folder:
            file = Path(folder) / ".baklava-check"
            file.touch()
            artifacts = get_artifact_repository(place, tracking_uri=client.tracking_uri)
            artifacts.log_artifact(str(file))
        with suppress(Exception):  # not every store can delete, and the file is empty
            artifacts.delete_artifacts(file.name)
    except (MlflowException, SQLAlchemyError, ImportError):
        raise
    except Exception as error:  # whatever the library of a store raises, such as boto3's
        reason = reason_of(error) if isinstance(error, OSError) else error_summary(error)
        raise UserError(
            f"files of runs cannot be written to {without_password(place)} ({reason}); make it writable, or "
            "set MLFLOW_TRACKING_URI to another database or server"
        ) from None
