"""Run folders, and the append-only journals in them."""

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


def new_run_dir(prefix: str = "") -> Path:
    """Return a folder in runs/ named by the time.

    Under `ray job submit` it lies in the data folder, since Ray deletes a job's working directory.
    """
    in_job = "runtime_resources" in Path.cwd().parts
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return (data_dir() if in_job else Path()) / "runs" / f"{prefix}{stamp}"


def check_new_run_dir(out: Path, kind: str) -> None:
    """Raise UserError if the folder cannot be created or is not empty; `kind` names what would run in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"--out {out} exists already; choose another folder, or resume the {kind} in it: --resume {out}"
        )
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {out} cannot be created, since {parent} is not a writable folder; choose another one")


def unwritable_message(out: Path, error: OSError) -> str:
    """Describe a disk that is full or takes no more for another reason."""
    return f"cannot write to {out} ({error.strerror or error}); free some space there, nothing in it is lost"


Record = TypeVar("Record", bound=FrozenModel)


class Journal(Generic[Record]):
    """A file of JSON lines to which records are appended, each on disk before `append` returns."""

    def __init__(self, path: Path, records: Sequence[Record] = ()) -> None:
        self.path = path
        self.records = list(records)

    @classmethod
    def open(cls, path: Path, parse: Callable[[str], Record]) -> "Journal[Record]":
        """Open a journal with its records; drop a last line that a kill cut short.

        Raises:
            UserError: the file was changed by hand.
        """
        complete = _complete_lines(path)
        if path.exists() and path.stat().st_size > len(complete.encode()):
            os.truncate(path, len(complete.encode()))
        return cls(path, cls.read(path, parse))

    @staticmethod
    def read(path: Path, parse: Callable[[str], Record]) -> list[Record]:
        """Return the records of a journal that another process may be writing to; raise like `open`."""
        records = []
        for line in _complete_lines(path).splitlines():
            try:
                records.append(parse(line))
            except ValidationError:
                raise UserError(
                    f"{path} has a line that is not one of its records ({line[:60]!r}); restore the original file"
                ) from None
        return records

    def append(self, record: Record) -> None:
        """Append one record, and return when it is on disk.

        Raises:
            UserError: the disk does not take it; the file is then as it was before.
        """
        line = json.dumps(record.model_dump(mode="json", exclude_none=True), allow_nan=False)
        size_before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size_before)
            raise UserError(unwritable_message(self.path.parent, error)) from None
        self.records.append(record)


def _complete_lines(path: Path) -> str:
    try:
        text = path.read_text() if path.exists() else ""
        return text[: text.rfind("\n") + 1]
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read journal {path} ({type(error).__name__}); restore it, or start again without it"
        ) from None
