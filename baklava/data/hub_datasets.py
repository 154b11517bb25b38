"""Rows of data sets, streamed from a repository on the hub, from its files, or from local files."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baklava.errors import UserError

Row = dict[str, Any]
BUILDER_OF_SUFFIX = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def stream_rows(what: str, remedy: str, **arguments: Any) -> Iterator[Row]:
    """Yield the rows of `datasets.load_dataset(**arguments)`, without downloading all of a large data set.

    Args:
        what: Start of the error message: what is read.
        remedy: End of the error message.
        arguments: As for `load_dataset`.

    Raises:
        UserError: the data set cannot be read; raised at any row.
    """
    try:
        import datasets  # imported here, since it takes a second

        yield from datasets.load_dataset(**arguments, streaming=True)
    except Exception as error:  # the hub raises dozens of errors, with one remedy
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise UserError(f"{what} could not be read ({type(error).__name__}: {reason}); {remedy}.") from error


def stream_file_rows(what: str, remedy: str, *, files: str, where: Mapping[str, str]) -> Iterator[Row]:
    """Yield the rows of .json, .jsonl or .parquet files whose columns have the values of `where`.

    Row groups of parquet files without such values are not downloaded.

    Args:
        what: Start of the error message: what is read.
        remedy: End of the error message.
        files: A path, a pattern such as hf://datasets/owner/name/folder/test-*.parquet, or a file in an archive as
            zip://inner.jsonl::hf://datasets/owner/name/data.zip.
        where: Values by column.
    """
    builder = BUILDER_OF_SUFFIX[Path(files.split("::")[0]).suffix]
    arguments: dict[str, Any] = {
        "path": builder,
        "data_files": files,
        "split": "train",  # the name that `datasets` gives to the only split of files
    }
    if where and builder == "parquet":
        arguments["filters"] = [(column, "==", value) for column, value in where.items()]
    for row in stream_rows(what, remedy, **arguments):
        if all(row.get(column, value) == value for column, value in where.items()):
            yield row


def local_data_file(name: str) -> str:
    """Return the absolute path of a local data file.

    Raises:
        UserError: the file does not exist, or its suffix is not supported.
    """
    path = Path(name)
    if path.suffix not in BUILDER_OF_SUFFIX:
        raise UserError(
            f"data file {name!r} ends in {path.suffix!r}; it must be one of {', '.join(BUILDER_OF_SUFFIX)}."
        )
    if not path.is_file():
        raise UserError(f"data file {name!r} does not exist; correct the path.")
    return str(path.resolve())


def check_row(row: Row, columns: tuple[str, ...], what: str) -> Row:
    """Return the row if it has values in these columns.

    Raises:
        UserError: a column is missing, empty, or of another type.
    """
    invalid = [name for name in columns if not _is_usable(row.get(name)) and row.get(name) not in (None, [])]
    if invalid:
        raise UserError(
            f"{what} has {row[invalid[0]]!r} in column {invalid[0]!r} of a row, which is neither text nor a list of "
            "texts; give rows in the format of the published data set."
        )
    if missing := [column for column in columns if row.get(column) in (None, [])]:
        raise UserError(
            f"{what} has nothing in column {', '.join(map(repr, missing))} of a row with {', '.join(map(repr, row))}; "
            "give rows in the format of the published data set."
        )
    return row


def _is_usable(value: Any) -> bool:
    """Return whether a value is text, a list of texts of which none is empty, or a number of tokens."""
    if isinstance(value, list | tuple):
        return all(isinstance(text, str) and text for text in value)
    return isinstance(value, str | int)


ARTICLE_TITLE = re.compile(r"\s*= (?!= )(.+?)(?<! =) =\s*")  # titles of sections have two equals signs or more


@dataclass(frozen=True)
class PublishedCorpus:
    """The files of a corpus, the columns of its rows, and the function that turns rows into pairs of title and text."""

    files: str
    columns: tuple[str, ...]
    read: Callable[[Iterable[Row]], Iterator[tuple[str, str]]]


def articles(rows: Iterable[Row]) -> Iterator[tuple[str, str]]:
    """Yield the articles of WikiText, whose rows are lines with their newline, or "" for an empty line."""
    title, lines, after_empty_line = "", list[str](), True
    for line in (row["text"] for row in rows):
        if after_empty_line and (match := ARTICLE_TITLE.fullmatch(line)):  # other matches are formulas
            yield title, "".join(lines)
            title, lines = match[1], []
        lines.append(line if line.endswith("\n") else f"{line}\n")
        after_empty_line = not line.strip()
    yield title, "".join(lines)


def books(rows: Iterable[Row]) -> Iterator[tuple[str, str]]:
    """Yield the books of PG-19, one per row."""
    for row in rows:
        yield row["short_book_title"], row["text"]


WIKITEXT = "hf://datasets/Salesforce/wikitext/wikitext-103-raw-v1/test-*.parquet"
PG19 = "hf://datasets/emozilla/pg19-test/data/test-*.parquet"
PUBLISHED_CORPORA = {
    "wikitext": PublishedCorpus(WIKITEXT, ("text",), articles),
    "pg19": PublishedCorpus(PG19, ("short_book_title", "text"), books),
}
