"""Why MLflow's server, database or registry cannot be used, and what helps.

mlflow is imported inside functions only.
"""

import logging
import os
import re
from importlib.metadata import version
from pathlib import Path

from baklava.paths import reason_of, tracking_uri

_SQLITE = "sqlite:///"
LOG_LEVELS = {"alembic": logging.WARNING, "mlflow": logging.WARNING, "mlflow.store.db.utils": logging.CRITICAL}
"""Levels of MLflow's loggers: those of its database print the stack of an error that its caller handles."""

_MAX_REASON_CHARACTERS = 200


def tracking_database() -> Path | None:
    """Return the file of the tracking database; None if it is a server or another kind of database."""
    name, _, _ = tracking_uri().removeprefix(_SQLITE).partition("?")
    return Path(name) if tracking_uri().startswith(_SQLITE) and not name.startswith((":", "file:")) else None


def tracking_place() -> str:
    """Return what trials and plans are recorded in, without the password in its address."""
    kind = "server" if tracking_uri().startswith("http") else "database"
    return f"the tracking {kind} at {without_password(tracking_uri())}"


def without_password(text: str) -> str:
    """Return a text without the users, passwords and tokens in its addresses."""
    return re.sub(r"(://)[^/\s]+@", r"\1***@", text)


def error_summary(error: BaseException) -> str:
    """Return the first line of an error without passwords; MLflow explains its errors over pages."""
    lines = str(error).strip().splitlines()
    return without_password(lines[0])[:_MAX_REASON_CHARACTERS] if lines else type(error).__name__


_OTHER_PLACE = "set MLFLOW_TRACKING_URI to another one"

_LOGIN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to a valid one"

_EXPLANATIONS = (
    ("database is locked", "another process has locked it", "wait until that one has ended, and start again"),
    ("readonly database", "it cannot be written", f"make the file and its folder writable, or {_OTHER_PLACE}"),
    ("unable to open database", "it cannot be opened", f"make the file and its folder writable, or {_OTHER_PLACE}"),
    ("disk is full|No space left", "its disk is full", f"free some space there, or {_OTHER_PLACE}"),
    ("is not a database", "the file is not a database", f"restore it from a backup, or {_OTHER_PLACE}"),
    (
        "filesystem tracking backend",
        "MLflow does not write to folders of files any more",
        "set MLFLOW_TRACKING_URI to a database such as sqlite:///mlflow.db; `mlflow migrate-filestore` copies the runs",
    ),
    ("error code 401|UNAUTHENTICATED", "it wants a login (401)", _LOGIN),
    (
        "error code 403|PERMISSION_DENIED",
        "it does not permit that (403)",
        f"ask for the permission to edit, or {_LOGIN}",
    ),
)
"""What the text of an error contains, why that is, and what helps."""


def explain_tracking_error(error: BaseException) -> tuple[str, str]:
    """Return why MLflow refuses, and what helps."""
    text = f"{error} {getattr(error, 'error_code', '')}"
    if schema := re.search(r"found version (\w+), but expected", text):
        return _explain_schema(schema[1])
    for pattern, reason, remedy in _EXPLANATIONS:
        if re.search(pattern, text):
            return reason, remedy
    if isinstance(error, ImportError):
        return f"it needs {error.name}, which is not installed", f"pip install {error.name}, or {_OTHER_PLACE}"
    if "API request to" in text:
        reason = f"it answers {status[1]}" if (status := re.search(r"error code (\d+)", text)) else "it does not answer"
        return reason, "start it, correct MLFLOW_TRACKING_URI, or unset it to use the database in the data folder"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {reason_of(error)}", f"make it a writable folder, or {_OTHER_PLACE}"
    return error_summary(error).rstrip("."), f"correct that, or {_OTHER_PLACE}"


def _explain_schema(found: str) -> tuple[str, str]:
    import mlflow

    installed = version("mlflow")
    migrations = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    if found != "None" and not any(migrations.glob(f"{found}_*.py")):
        return (
            f"a newer MLflow than the installed {installed} has written it",
            f"install that version of mlflow, or {_OTHER_PLACE}",
        )
    uri = '"$MLFLOW_TRACKING_URI"' if os.environ.get("MLFLOW_TRACKING_URI") else tracking_uri()
    return (
        f"an older MLflow than the installed {installed} has written it",
        f"back it up, then run: mlflow db upgrade {uri}",
    )
