"""A client of the MLflow server that touches no global state of MLflow, and errors that a user understands."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from baklava.console import log
from baklava.errors import UserError
from baklava.paths import data_dir, tracking_uri

PARENT_TAG = "mlflow.parentRunId"

TRACKING_ERRORS = (MlflowException, SQLAlchemyError, OSError)
"""What is raised if the server is down, full or out of reach."""


def connect(experiment: str) -> tuple[MlflowClient, str]:
    """Return a client of a server that answers, and the id of the experiment with this name.

    Raises:
        UserError: the server does not answer.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    uri = tracking_uri()
    log(f"mlflow: opening {uri}")
    with tracking_errors_as_user_errors("start it, or unset MLFLOW_TRACKING_URI to record in a local database"):
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(tracking_uri=uri)
        return client, _experiment_id(client, experiment)


@contextmanager
def tracking_errors_as_user_errors(remedy: str) -> Iterator[None]:
    """Turn errors of the server inside the block into a UserError with this remedy."""
    try:
        yield
    except TRACKING_ERRORS as error:
        raise UserError(
            f"the tracking server at {tracking_uri()} cannot be used ({error_summary(error)}); {remedy}"
        ) from None


def is_invalid_parameter(error: Exception) -> bool:
    """Return whether the server answered that it does not accept a value."""
    return isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE"


def source_tags(command: str) -> dict[str, str]:
    """Return the tags that MLflow shows as a run's source: the command that made it."""
    return {"mlflow.source.name": command, "mlflow.source.type": "LOCAL"}


def now_ms() -> int:
    """Return the time in milliseconds, MLflow's unit."""
    return int(time.time() * 1000)


def error_summary(error: Exception) -> str:
    """Return the first line of an error; MLflow explains its errors over pages."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _experiment_id(client: MlflowClient, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment:
        return str(experiment.experiment_id)
    is_local = tracking_uri().startswith("sqlite:///") and not os.environ.get("MLFLOW_TRACKING_URI")
    artifacts = (data_dir() / "mlartifacts").as_uri() if is_local else None
    return str(client.create_experiment(name, artifact_location=artifacts))
