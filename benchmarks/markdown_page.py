"""Tables in pages: what stands between two markers is written by a benchmark."""

from pathlib import Path

from baklava.errors import UserError
from baklava.serialization import atomic_write_text


def put(page: Path, name: str, text: str, option: str = "--readme") -> None:
    """Write `text` between the markers of this name, in the place of what is there; raises as `check_page`."""
    begin, end = markers(name)
    before, _, rest = check_page(page, name, option).partition(begin)
    atomic_write_text(page, f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}")


def check_page(page: Path, name: str, option: str = "--readme") -> str:
    """What is on a page.

    Raises:
        UserError: it has not got both markers once.
    """
    begin, end = markers(name)
    try:
        content = page.read_text()
    except OSError as error:
        raise UserError(f"{option} {page} cannot be read ({error.strerror}); name a Markdown file") from None
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise UserError(f"{option} {page} needs one line {begin} and below it one line {end}; add them")
    return content


def markers(name: str) -> tuple[str, str]:
    """The comments before and behind a table."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def line(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
