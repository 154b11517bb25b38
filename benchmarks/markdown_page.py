"""Markdown pages with sections that a benchmark writes, each between two marker comments."""

from pathlib import Path

from baklava.errors import UserError
from baklava.serialization import atomic_write_text


def write_section(page: Path, name: str, text: str, option: str = "--readme") -> None:
    """Replace what is between the page's markers of this name; raises as `read_checked` does."""
    begin, end = section_markers(name)
    before, _, rest = read_checked(page, name, option).partition(begin)
    atomic_write_text(page, f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}")


def read_checked(page: Path, name: str, option: str = "--readme") -> str:
    """Return the content of a page.

    Raises:
        UserError: it cannot be read, or does not have both markers exactly once and in order.
    """
    begin, end = section_markers(name)
    try:
        content = page.read_text()
    except OSError as error:
        raise UserError(f"{option} {page} cannot be read ({error.strerror}); name a Markdown file") from None
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise UserError(f"{option} {page} needs one line {begin} and below it one line {end}; add them")
    return content


def section_markers(name: str) -> tuple[str, str]:
    """Return the comments before and after a section."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def table_row(cells: list[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
