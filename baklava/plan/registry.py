"""Load plans from files and from MLflow's model registry.

mlflow is imported inside functions only: plans themselves need none of it.
"""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from baklava.errors import UserError
from baklava.paths import tracking_uri
from baklava.plan.budget_plan import BudgetPlan

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
    uri = tracking_uri()
    # MLflow would create an empty database under any name.
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise UserError(f"there is no tracking database at {uri}; run a search first or set MLFLOW_TRACKING_URI")
    for name, value in _MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    client = MlflowClient(uri, uri)
    try:
        return download_plan(client, *_resolve_version(client, source))
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = str(error).splitlines()[0].partition(" with exception")[0].rstrip(". ")
        raise UserError(
            f"cannot fetch {source} from {uri}: {reason}; check MLFLOW_TRACKING_URI or give a plan file"
        ) from None


def _resolve_version(client: "MlflowClient", source: str) -> tuple[str, str]:
    """The name and version that an address stands for."""
    address = source.removeprefix(REGISTRY_SCHEME)
    name, at, alias = address.partition("@")
    if not at:
        name, slash, version = address.rpartition("/")
        if not (slash and version.isdecimal()):
            raise UserError(f"{source} has no version; write models:/NAME@ALIAS or models:/NAME/VERSION")
        _aliases(client, name)
        return name, version
    aliases = _aliases(client, name)
    if alias not in aliases:
        _raise_unknown("alias", alias, sorted(aliases), f"registered plan {name}")
    return name, aliases[alias]


def _aliases(client: "MlflowClient", name: str) -> dict[str, str]:
    """The versions of a registered plan by alias; an unknown name is an error that lists the known ones."""
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(name).aliases
        return {alias: str(version) for alias, version in aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    page = client.search_registered_models()
    known = [model.name for model in page]
    while page.token:
        page = client.search_registered_models(page_token=page.token)
        known += [model.name for model in page]
    _raise_unknown("registered plan", name, sorted(known), "registry")


def _raise_unknown(kind: str, name: str, known: list[str], place: str) -> NoReturn:
    names = ", ".join(known[:_MAX_NAMES_IN_ERROR]) or "none"
    more = f" and {len(known) - _MAX_NAMES_IN_ERROR} more" if len(known) > _MAX_NAMES_IN_ERROR else ""
    raise UserError(f"no {kind} is named {name!r}; the {place} has {names}{more}")
