"""Where a plan comes from: a file, or the registry of MLflow. The only file of this package that imports mlflow."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from baklava.errors import UserError
from baklava.paths import tracking_uri
from baklava.plan.budget_plan import BudgetPlan

if TYPE_CHECKING:
    from mlflow import MlflowClient

REGISTRY = "models:/"
_PLAN_FILE = "plan.json"
_QUICK_AND_QUIET = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # it would ask a server that is down for minutes
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def resolve(source: str) -> BudgetPlan:
    """The plan at a path, or at `models:/NAME@ALIAS` or `models:/NAME/VERSION` in the registry.

    The registry is the one at `$MLFLOW_TRACKING_URI`, else `mlflow.db` in the data folder.

    Raises:
        UserError: the file, the registered name, the alias or the tracking server is not there, or it is no plan.
    """
    return _registered(source) if source.startswith(REGISTRY) else BudgetPlan.read(source)


def _registered(source: str) -> BudgetPlan:
    uri = tracking_uri()
    _check_database(uri)
    for name, value in _QUICK_AND_QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient, artifacts
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    client = MlflowClient(uri, uri)
    try:
        # Given a models:/ address, MLflow would look in its own default registry, whatever it is told.
        address = client.get_model_version_download_uri(*_version(client, source))
        with tempfile.TemporaryDirectory() as folder:
            path = artifacts.download_artifacts(f"{address}/{_PLAN_FILE}", dst_path=folder, tracking_uri=uri)
            return BudgetPlan.read(path)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = str(error).splitlines()[0].partition(" with exception")[0].rstrip(". ")
        raise UserError(
            f"cannot fetch {source} from {uri}: {reason}; check MLFLOW_TRACKING_URI or give a plan file"
        ) from None


def _check_database(uri: str) -> None:
    # MLflow would make an empty database of any name.
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise UserError(f"there is no tracking database at {uri}; run a search first or set MLFLOW_TRACKING_URI")


def _version(client: "MlflowClient", source: str) -> tuple[str, str]:
    """Name and version of a registry address."""
    address = source.removeprefix(REGISTRY)
    name, at, alias = address.partition("@")
    if not at:
        name, slash, number = address.rpartition("/")
        if not (slash and number.isdecimal()):
            raise UserError(f"{source} names no version; write models:/NAME@ALIAS or models:/NAME/VERSION")
        _aliases(client, name)
        return name, number
    aliases = _aliases(client, name)
    if alias not in aliases:
        _unknown("alias", alias, sorted(aliases), f"registered plan {name}")
    return name, aliases[alias]


def _aliases(client: "MlflowClient", name: str) -> dict[str, str]:
    models = {model.name: model for model in client.search_registered_models()}
    if name not in models:
        _unknown("registered plan", name, sorted(models), "registry")
    return dict(models[name].aliases)


def _unknown(kind: str, name: str, known: list[str], where: str) -> NoReturn:
    raise UserError(f"no {kind} is named {name!r}; the {where} has {', '.join(known) or 'none'}")
