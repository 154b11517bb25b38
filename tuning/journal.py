"""The journal: one line of JSON per thing that is finished, the one source of truth of what is under way."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from baklava.errors import UserError
from baklava.records import Record

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
        text = _text(path) if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            os.truncate(path, len(whole.encode()))
        return cls(path, [_parsed(parse, line, path) for line in whole.splitlines()])

    def append(self, record: Entry) -> None:
        """Add one record, and return when it is on disk."""
        self.records.append(record)
        line = json.dumps(record.model_dump(mode="json", exclude_none=True), allow_nan=False)
        with self.path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read journal {path} ({type(error).__name__}); begin anew without --resume") from None


def _parsed(parse: Callable[[str], Entry], line: str, path: Path) -> Entry:
    try:
        return parse(line)
    except ValidationError:
        raise UserError(
            f"{path} holds a line that is none of its records ({line[:60]!r}); put back what it was"
        ) from None
