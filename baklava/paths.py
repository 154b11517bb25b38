"""Where baklava keeps what outlives a run: downloads in the cache, results in the data folder."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder of what can be fetched or computed again: downloads, the converted demo model, parsed texts, profiles.

    `$BAKLAVA_CACHE`, else `$XDG_CACHE_HOME/baklava`, else `~/.cache/baklava`.
    """
    return _folder("BAKLAVA_CACHE", "XDG_CACHE_HOME", ".cache")


def data_dir() -> Path:
    """Folder of what cannot be made again for free: the tracking database and its artifacts.

    `$BAKLAVA_DATA`, else `$XDG_DATA_HOME/baklava`, else `~/.local/share/baklava`.
    """
    return _folder("BAKLAVA_DATA", "XDG_DATA_HOME", ".local/share")


def _folder(own: str, xdg: str, fallback: str) -> Path:
    if os.environ.get(own):
        return Path(os.environ[own]).expanduser().absolute()
    base = os.environ.get(xdg)
    return (Path(base) if base else Path.home() / fallback) / "baklava"


def tracking_uri() -> str:
    """Where trials and registered plans are kept: `$MLFLOW_TRACKING_URI`, else a database in the data folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{data_dir() / 'mlflow.db'}"
