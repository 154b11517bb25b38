"""Folders that results go into."""

import os
from datetime import UTC, datetime
from pathlib import Path

from baklava.errors import UserError
from baklava.paths import data_dir


def check_new(out: Path, what: str) -> None:
    """Raise UserError when the folder cannot be made, or holds something already; `what` is under way there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists already; choose another folder, or go on with its {what}: --resume {out}")
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"--out {out} cannot be made, since {place} is no folder to write in; choose another one")


def unwritable(out: Path, error: OSError) -> str:
    """A sentence for a disk that is full, or for another reason takes nothing more."""
    return f"cannot write to {out} ({error.strerror or error}); make room there, nothing that it holds is lost"


def new_folder(prefix: str = "") -> Path:
    """A folder in runs/ named by the time; under `ray job submit` in the data folder, as Ray deletes a job's own."""
    in_job = "runtime_resources" in Path.cwd().parts
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return (data_dir() if in_job else Path()) / "runs" / f"{prefix}{stamp}"
