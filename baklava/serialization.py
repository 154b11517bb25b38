"""The base class of all records that are saved, and the way files are written."""

import os
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """A frozen record that is read from and written to JSON. Unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def atomic_write_text(path: Path, text: str) -> None:
    """Write a file by renaming a complete one, so that readers never see a part of it, even if the writer is killed.

    If the disk does not take it, nothing of it stays.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
