"""Folders that results go into."""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from baklava.errors import UserError
from baklava.paths import data_dir
from baklava.serialization import FrozenModel


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


Entry = TypeVar("Entry", bound=FrozenModel)


class Journal(Generic[Entry]):
    """Appends to a file of lines, each on disk before the next one is begun."""

    def __init__(self, path: Path, records: Sequence[Entry] = ()) -> None:
        self.path, self.records = path, list(records)

    @classmethod
    def open(cls, path: Path, parse: Callable[[str], Entry]) -> "Journal[Entry]":
        """The journal with the records that it holds; a last line that a kill cut short is dropped.

        Raises:
            UserError: the file was changed by hand.
        """
        whole = _whole(path)
        if path.exists() and path.stat().st_size > len(whole.encode()):
            os.truncate(path, len(whole.encode()))
        return cls(path, cls.read(path, parse))

    @staticmethod
    def read(path: Path, parse: Callable[[str], Entry]) -> list[Entry]:
        """The records of a journal that somebody may be writing to; raises as `open`."""
        return [_parsed(parse, line, path) for line in _whole(path).splitlines()]

    def append(self, record: Entry) -> None:
        """Add one record, and return when it is on disk.

        Raises:
            UserError: the disk does not take it; the file is then as it was before.
        """
        line = json.dumps(record.model_dump(mode="json", exclude_none=True), allow_nan=False)
        whole = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, whole)
            raise UserError(unwritable(self.path.parent, error)) from None
        self.records.append(record)


def _whole(path: Path) -> str:
    """The lines that are complete."""
    try:
        text = path.read_text() if path.exists() else ""
        return text[: text.rfind("\n") + 1]
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read journal {path} ({type(error).__name__}); put it back, or begin anew without it"
        ) from None


def _parsed(parse: Callable[[str], Entry], line: str, path: Path) -> Entry:
    try:
        return parse(line)
    except ValidationError:
        raise UserError(
            f"{path} holds a line that is none of its records ({line[:60]!r}); put back what it was"
        ) from None
