"""The tracking server: a client that touches no global state of MLflow, and what its failures are to a user."""

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

WRITE_ERRORS = (MlflowException, SQLAlchemyError, OSError)
"""What a server raises that is down, full or not to be reached."""


def connect(experiment: str) -> tuple[MlflowClient, str]:
    """A client of a server that answers, and the id of the experiment with this name.

    Raises:
        UserError: it does not.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    uri = tracking_uri()
    log(f"mlflow: opening {uri}")
    with refused("start it, or unset MLFLOW_TRACKING_URI to record in a local database"):
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(tracking_uri=uri)
        return client, _experiment(client, experiment)


@contextmanager
def refused(remedy: str) -> Iterator[None]:
    """Within it, a server that fails is a `UserError` with this remedy."""
    try:
        yield
    except WRITE_ERRORS as error:
        raise UserError(
            f"the tracking server at {tracking_uri()} cannot be used ({first_line(error)}); {remedy}"
        ) from None


def rejects(error: Exception) -> bool:
    """Whether a server that is there does not take what it was given."""
    return isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE"


def now() -> int:
    """The time as MLflow counts it, in milliseconds."""
    return int(time.time() * 1000)


def first_line(error: Exception) -> str:
    """What went wrong, without MLflow's pages of explanation."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found:
        return str(found.experiment_id)
    local = tracking_uri().startswith("sqlite:///") and not os.environ.get("MLFLOW_TRACKING_URI")
    return str(
        client.create_experiment(name, artifact_location=(data_dir() / "mlartifacts").as_uri() if local else None)
    )
