"""Published corpora for perplexity: where their files are on the hub, and how their rows become texts."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from baklava.hub import Row

TITLE = re.compile(r"\s*= (?!= )(.+?)(?<! =) =\s*")  # of an article; those of its sections have two signs or more


@dataclass(frozen=True)
class Published:
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
PUBLISHED = {
    "wikitext": Published(WIKITEXT, ("text",), articles),
    "pg19": Published(PG19, ("short_book_title", "text"), books),
}
