"""Rows of data sets, streamed: of files on the hub or of one's own, or of a whole repository."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baklava.errors import UserError

Row = dict[str, Any]
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def stream_rows(what: str, remedy: str, **arguments: Any) -> Iterator[Row]:
    """The rows that `datasets.load_dataset(**arguments)` streams, so that a large data set is not fetched whole.

    `what` begins the sentence that a failure becomes, `remedy` ends it. Raises UserError, also while rows are taken.
    """
    try:
        import datasets  # here, since it costs a second that only a data set is worth

        yield from datasets.load_dataset(**arguments, streaming=True)
    except Exception as error:  # a hub fails in dozens of ways, and to the user they are one
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise UserError(f"{what} could not be read ({type(error).__name__}: {reason}); {remedy}.") from error


def stream_file_rows(what: str, remedy: str, *, files: str, where: Mapping[str, str]) -> Iterator[Row]:
    """The rows of .json, .jsonl or .parquet files whose columns have the values of `where`.

    `files` is a path, a pattern such as hf://datasets/owner/name/folder/test-*.parquet, or a file in an archive as
    zip://inner.jsonl::hf://datasets/owner/name/data.zip. Row groups of parquet files that cannot match are not fetched.
    """
    builder = BUILDERS[Path(files.split("::")[0]).suffix]
    arguments: dict[str, Any] = {"path": builder, "data_files": files, "split": "train"}  # one unnamed split of files
    if where and builder == "parquet":
        arguments["filters"] = [(column, "==", value) for column, value in where.items()]
    for row in stream_rows(what, remedy, **arguments):
        if all(row.get(column, value) == value for column, value in where.items()):
            yield row


def local_data_file(name: str) -> str:
    """The absolute path of a file of one's own.

    Raises:
        UserError: it does not exist, or its ending is none of BUILDERS.
    """
    path = Path(name)
    if path.suffix not in BUILDERS:
        raise UserError(f"data file {name!r} ends in {path.suffix!r}; it must be one of {', '.join(BUILDERS)}.")
    if not path.is_file():
        raise UserError(f"data file {name!r} does not exist; correct the path.")
    return str(path.resolve())


def check_row(row: Row, columns: tuple[str, ...], what: str) -> Row:
    """The row, which must have something in these columns.

    Raises:
        UserError: with the columns that are missing and those that are there.
    """
    wrong = [name for name in columns if not _usable(row.get(name)) and row.get(name) not in (None, [])]
    if wrong:
        raise UserError(
            f"{what} has {row[wrong[0]]!r} in column {wrong[0]!r} of a row, which is neither text nor a list of texts; "
            "give rows in the format of the published data set."
        )
    if missing := [column for column in columns if row.get(column) in (None, [])]:
        raise UserError(
            f"{what} has nothing in column {', '.join(map(repr, missing))} of a row with {', '.join(map(repr, row))}; "
            "give rows in the format of the published data set."
        )
    return row


def _usable(value: Any) -> bool:
    """Whether a column holds text, a list of texts of which none is empty, or a count of tokens."""
    if isinstance(value, list | tuple):
        return all(isinstance(each, str) and each for each in value)
    return isinstance(value, str | int)


TITLE = re.compile(r"\s*= (?!= )(.+?)(?<! =) =\s*")  # of an article; those of its sections have two signs or more


@dataclass(frozen=True)
class PublishedCorpus:
    """The files of a corpus, the columns its rows have, and what makes titles and texts of rows."""

    files: str
    columns: tuple[str, ...]
    read: Callable[[Iterable[Row]], Iterator[tuple[str, str]]]


def articles(rows: Iterable[Row]) -> Iterator[tuple[str, str]]:
    """Articles of WikiText, whose rows are lines, ended by their own newline, or "" for an empty line."""
    title, lines, blank = "", list[str](), True
    for line in (row["text"] for row in rows):
        if blank and (found := TITLE.fullmatch(line)):  # a formula may look like a title, but not after an empty line
            yield title, "".join(lines)
            title, lines = found[1], []
        lines.append(line if line.endswith("\n") else f"{line}\n")
        blank = not line.strip()
    yield title, "".join(lines)


def books(rows: Iterable[Row]) -> Iterator[tuple[str, str]]:
    """Books of PG-19, one a row."""
    for row in rows:
        yield row["short_book_title"], row["text"]


WIKITEXT = "hf://datasets/Salesforce/wikitext/wikitext-103-raw-v1/test-*.parquet"
PG19 = "hf://datasets/emozilla/pg19-test/data/test-*.parquet"
PUBLISHED_CORPORA = {
    "wikitext": PublishedCorpus(WIKITEXT, ("text",), articles),
    "pg19": PublishedCorpus(PG19, ("short_book_title", "text"), books),
}
