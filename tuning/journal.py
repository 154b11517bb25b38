"""The journal: one line of JSON per thing that is finished, the one source of truth of what is under way."""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from baklava.errors import UserError
from baklava.records import Record
from tuning.folders import unwritable

Entry = TypeVar("Entry", bound=Record)


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
