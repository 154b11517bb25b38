"""Markdown pages with sections that a benchmark writes, each between two marker comments."""

from collections.abc import Sequence
from pathlib import Path

from baklava.errors import UserError
from baklava.serialization import atomic_write_text


def write_section(page: Path, name: str, text: str) -> None:
    """Replace the text between the page's markers of this name; raise as `read_page` does."""
    begin, end = section_markers(name)
    before, _, rest = read_page(page, name).partition(begin)
    atomic_write_text(page, f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}")


def read_page(page: Path, name: str) -> str:
    """Return the content of a page that has a section of this name.

    Raises:
        UserError: the page cannot be read, or does not have both markers exactly once and in order.
    """
    begin, end = section_markers(name)
    try:
        content = page.read_text()
    except OSError as error:
        raise UserError(f"--page {page} cannot be read ({error.strerror}); name a Markdown file") from None
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise UserError(f"--page {page} needs one line {begin} and below it one line {end}; add them")
    return content


def section_markers(name: str) -> tuple[str, str]:
    """Return the comments before and after a section."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
