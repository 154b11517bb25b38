"""The search: many plans tried on resident replicas, the winner recorded and registered."""

import os
import sys

# Ray and MLflow read these when they are first imported, here and in every process that Ray starts, so they stand
# before any import of ours. What is set already stays.
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",  # `ray start` and `ray job` never ask for one alone, and Ray listens everywhere
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0: no boxes, no tables
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files beside our own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the search, instead of going on to a half-searched winner
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default asks a dead server for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines of addresses for every trial
}
if sys.stderr is None or not sys.stderr.isatty():
    _ENVIRONMENT["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # a log keeps every redraw of a bar
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
