"""The search: many plans tried by resident workers, the winner recorded and registered."""

import os
import sys

from baklava.runtime.cpu_threads import configure_threads
from baklava.runtime.ray_session import configure_ray_environment


def configure_environment() -> None:
    """Set the defaults of OpenMP, Ray, MLflow and the hub that the command lines rely on; what is set already stays.

    Call it before the first import of torch, ray, mlflow or transformers, which read some of these when they are
    imported.
    """
    configure_ray_environment()
    configure_threads()
    defaults = {
        "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0: no boxes, no tables
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files next to our own
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the search, instead of choosing a half-searched winner
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default waits minutes for a dead server
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines of addresses for every trial
    }
    if sys.stderr is None or not sys.stderr.isatty():
        defaults["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # a log keeps every redraw of a bar
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
