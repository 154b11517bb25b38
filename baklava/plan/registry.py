"""Load plans from files and from MLflow's model registry, and explain why its server or database cannot be used.

mlflow is imported inside functions only: plans themselves need none of it.
"""

import logging
import os
import re
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from baklava.errors import UserError
from baklava.paths import check_temp_dir, reason_of, tracking_uri
from baklava.plan.budget_plan import BudgetPlan

if TYPE_CHECKING:
    from mlflow import MlflowClient

REGISTRY_SCHEME = "models:/"
_PLAN_FILE = "plan.json"
_MAX_NAMES_IN_ERROR = 20
_REGISTER = "register one with baklava-search (in a clone: make search)"
_MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # by default MLflow retries for minutes if the server is down
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def load_plan(source: str) -> BudgetPlan:
    """Return the plan at a path, or at `models:/NAME@ALIAS` or `models:/NAME/VERSION` in the registry.

    The registry is the one at `$MLFLOW_TRACKING_URI`, else `mlflow.db` in the data folder.

    Raises:
        UserError: the file, the name, the version, the alias or the server does not exist, or it is not a plan.
    """
    return _load_registered(source) if source.startswith(REGISTRY_SCHEME) else BudgetPlan.read(source)


def download_plan(client: "MlflowClient", name: str, version: str) -> BudgetPlan:
    """Return the plan of a registered version; raise UserError if it is not a plan, MLflow's errors if it is gone."""
    from mlflow import artifacts

    uri = client.tracking_uri
    # Given a models:/ address, MLflow would look in its own default registry, not in this client's.
    address = client.get_model_version_download_uri(name, version)
    with tempfile.TemporaryDirectory() as folder:
        return BudgetPlan.read(
            artifacts.download_artifacts(f"{address}/{_PLAN_FILE}", dst_path=folder, tracking_uri=uri)
        )


def _load_registered(source: str) -> BudgetPlan:
    database = tracking_database()
    if database and not database.exists():  # MLflow would create an empty one under any name
        raise UserError(
            f"no plan is registered, since there is no tracking database at {database}; {_REGISTER}, or set "
            "MLFLOW_TRACKING_URI"
        )
    check_temp_dir()
    for name, value in _MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = MlflowClient(tracking_uri(), tracking_uri())
        name, version = _resolve_version(client, source)
        _check_has_plan(client, name, version)
        return download_plan(client, name, version)
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        reason, remedy = explain_tracking_error(error)
        raise UserError(
            f"cannot fetch {source} from {tracking_place()}: {reason}; {remedy}, or give a plan file"
        ) from None


def _resolve_version(client: "MlflowClient", source: str) -> tuple[str, str]:
    """The name and version that an address stands for."""
    address = source.removeprefix(REGISTRY_SCHEME)
    name, at, alias = address.partition("@")
    if at:
        aliases = _aliases(client, name)
        if alias not in aliases:
            _raise_unknown("alias", alias, sorted(aliases), f"registered plan {name}")
        return name, aliases[alias]
    name, slash, version = address.rpartition("/")
    if not (slash and version.isdecimal()):
        raise UserError(f"{source} has no version; write models:/NAME@ALIAS or models:/NAME/VERSION")
    _aliases(client, name)
    return name, version


def _check_has_plan(client: "MlflowClient", name: str, version: str) -> None:
    """Raise UserError if a registered plan has no such version, if its registration failed, or if its file is gone."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        found = client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = [str(each.version) for each in _all_pages(client.search_model_versions, f"name = '{name}'")]
        _raise_unknown("version", version, sorted(known, key=int), f"registered plan {name}")
    if found.status != "READY":
        raise UserError(f"version {version} of {name} is {found.status}, so it has no plan; choose another version")
    address = client.get_model_version_download_uri(name, version)
    files = [each.path for each in get_artifact_repository(address, client.tracking_uri).list_artifacts()]
    if _PLAN_FILE not in files:
        raise UserError(
            f"version {version} of {name} has no {_PLAN_FILE} any more at {address}; choose another version, or give "
            "the plan.json in the folder of its search"
        )


def _all_pages(search: Callable[..., Any], *arguments: object) -> list[Any]:
    """Everything that a search of MLflow finds; an answer has one page."""
    page = search(*arguments)
    found = list(page)
    while page.token:
        page = search(*arguments, page_token=page.token)
        found += page
    return found


def _aliases(client: "MlflowClient", name: str) -> dict[str, str]:
    """The versions of a registered plan by alias; an unknown name is an error that lists the known ones."""
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(name).aliases
        return {alias: str(version) for alias, version in aliases.items()}
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    known = [model.name for model in _all_pages(client.search_registered_models)]
    _raise_unknown("registered plan", name, sorted(known), "registry")


def _raise_unknown(kind: str, name: str, known: list[str], place: str) -> NoReturn:
    names = ", ".join(known[:_MAX_NAMES_IN_ERROR]) or "none"
    more = f" and {len(known) - _MAX_NAMES_IN_ERROR} more" if len(known) > _MAX_NAMES_IN_ERROR else ""
    without_any = "write models:/NAME/VERSION" if kind == "alias" else _REGISTER
    remedy = "choose one of them" if known else without_any
    raise UserError(f"no {kind} is named {name!r}; the {place} has {names}{more}; {remedy}")


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
