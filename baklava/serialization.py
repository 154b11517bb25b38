"""The base of every record that one stage hands to the next."""

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """Frozen plain data, readable from and writable to JSON; an unknown field is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` so that a reader never sees half of it, even after a kill."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)
