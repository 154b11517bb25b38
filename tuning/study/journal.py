"""Run folders, and the append-only journals in them."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from baklava.errors import UserError
from baklava.paths import DISK_FULL_ERRORS, UNWRITABLE_ERRORS, check_writable, data_dir, reason_of
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
    try:
        check_writable(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({reason_of(error)}); choose another folder") from None


def check_json_file(path: Path) -> None:
    """Raise UserError if the file of `--json` cannot be written."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--json {path} cannot be written; give a file in a folder that exists")
    try:
        if path.exists():  # it need not be in a folder that takes files, such as /dev/stdout
            path.open("ab").close()
        else:
            check_writable(path.absolute().parent)
    except OSError as error:
        raise UserError(f"--json {path} cannot be written ({reason_of(error)}); give a file elsewhere") from None


def unwritable_message(out: Path, error: OSError) -> str:
    """Describe a disk that is full or takes no more for another reason."""
    remedy = "free some space there" if error.errno in DISK_FULL_ERRORS else "make it writable"
    return f"cannot write to {out} ({error.strerror or error}); {remedy}, nothing in it is lost"


@contextmanager
def disk_errors_as_user_errors(out: Path) -> Iterator[None]:
    """Turn the errors of a disk that takes no more into a UserError; `out` is the folder that is written to."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE_ERRORS:
            raise
        raise UserError(unwritable_message(out, error)) from None


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
