"""Folders of what outlives a run: a cache for what can be made again, and the results."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the folder of what can be downloaded or computed again: texts, the converted demo model, profiles.

    It is `$BAKLAVA_CACHE`, `$XDG_CACHE_HOME/baklava` or `~/.cache/baklava`, whichever is set first.
    """
    return _user_dir("BAKLAVA_CACHE", "XDG_CACHE_HOME", ".cache")


def data_dir() -> Path:
    """Return the folder of results: the tracking database and its artifacts.

    It is `$BAKLAVA_DATA`, `$XDG_DATA_HOME/baklava` or `~/.local/share/baklava`, whichever is set first.
    """
    return _user_dir("BAKLAVA_DATA", "XDG_DATA_HOME", ".local/share")


def _user_dir(own_variable: str, xdg_variable: str, fallback: str) -> Path:
    if own := os.environ.get(own_variable):
        return Path(own).expanduser().absolute()
    base = os.environ.get(xdg_variable)
    return (Path(base) if base else Path.home() / fallback) / "baklava"


def tracking_uri() -> str:
    """Return where trials and registered plans are: `$MLFLOW_TRACKING_URI`, or else a database in the data folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{data_dir() / 'mlflow.db'}"
