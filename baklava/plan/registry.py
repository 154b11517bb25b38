"""Load plans from files and from MLflow's model registry.

mlflow is imported inside functions only: plans themselves need none of it.
"""

import logging
import os
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from baklava.errors import UserError
from baklava.paths import check_temp_dir, tracking_uri
from baklava.plan.budget_plan import BudgetPlan
from baklava.plan.tracking_errors import LOG_LEVELS, explain_tracking_error, tracking_database, tracking_place

if TYPE_CHECKING:
    from mlflow import MlflowClient

REGISTRY_SCHEME = "models:/"
_PLAN_FILE = "plan.json"
_MAX_NAMES_IN_ERROR = 20
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
        raise UserError(f"there is no tracking database at {database}; run a search first or set MLFLOW_TRACKING_URI")
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
    raise UserError(f"no {kind} is named {name!r}; the {place} has {names}{more}")
