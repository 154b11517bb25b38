"""Texts by name: a demo corpus, a file or folder of one's own, or a data set on the hub."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from baklava.console import log
from baklava.data import demo_corpora as corpora
from baklava.data.demo_assets import WHEELS, fetch_wheel
from baklava.data.hub_datasets import PUBLISHED_CORPORA, check_row, local_data_file, stream_file_rows, stream_rows
from baklava.errors import UserError, first_duplicate
from baklava.paths import cache_dir
from baklava.serialization import atomic_write_text

DEMO_CORPORA = tuple(corpora.PARSERS)
KNOWN = (*DEMO_CORPORA, *PUBLISHED_CORPORA)
SUFFIXES = (".txt", ".md", ".jsonl")
HUB_ROWS = 200  # of a data set; enough for every split of windows, and a stream may have no end
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^:]+){0,2}")
HUB_FORM = "owner/name[/config][:split[:column]]"


@dataclass(frozen=True)
class Document:
    """One text that is whole in itself; windows are drawn and split by document."""

    name: str
    text: str


def load_documents(names: Sequence[str]) -> list[Document]:
    """The non-empty documents of every name, in the order given.

    A name is `botocore`, `ifcraft` or `factbook`, `wikitext` or `pg19` (the test split on the hub, or with `=FILE`
    behind it a file with its rows), a .txt, .md or .jsonl file (its field `text`), a folder of those, or a hub data set
    as `owner/name[/config][:split[:column]]`. Raises UserError for a name that is none of these or has no text.
    """
    if not names:
        raise UserError(f"no text was named; give at least one of {', '.join(KNOWN)}, a file or a folder.")
    if twice := first_duplicate(names):
        raise UserError(f"text {twice!r} is named twice; name each text once.")
    return [document for name in names for document in _named(name)]


def documents_digest(documents: Sequence[Document]) -> str:
    """Sha256 over names and texts in their order: equal exactly when the documents are."""
    pairs = [[document.name, document.text] for document in documents]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _named(name: str) -> list[Document]:
    found = [document for document in _source(name)(name) if document.text.strip()]
    if not found:
        raise UserError(f"text {name!r} holds no text; name a file or folder that does.")
    return found


def _source(name: str) -> "Callable[[str], list[Document]]":
    if name in DEMO_CORPORA:
        return _corpus
    if name.partition("=")[0] in PUBLISHED_CORPORA:
        return _published
    if name and Path(name).exists():
        return _local
    if HUB_NAME.fullmatch(name) and not name.endswith(SUFFIXES):
        return _hub
    raise UserError(
        f"text {name!r} is neither a known corpus ({', '.join(KNOWN)}), nor a file or folder that exists, "
        f"nor a hub data set as {HUB_FORM}; correct the name."
    )


def _corpus(name: str) -> list[Document]:
    """A demo corpus, parsed once per version of its wheel and of the parser."""
    parser = Path(corpora.__file__).read_bytes()
    version = hashlib.sha256(WHEELS[name].sha256.encode() + parser).hexdigest()[:12]
    cached = cache_dir() / "texts" / f"{name}-{version}.json"
    texts = _read_json(cached)
    if texts is None:
        log(f"reading the texts of {name}, once")
        texts = corpora.PARSERS[name](fetch_wheel(name))
        cached.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(cached, json.dumps(texts))
    return [Document(f"{name}/{title}", text) for title, text in texts.items()]


def _read_json(path: Path) -> dict[str, str] | None:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):  # absent, or cut off by a full disk: both are mended by parsing again
        return None


def _local(name: str) -> list[Document]:
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        return [document for file in files for document in _file(file)]
    if path.suffix not in SUFFIXES:
        raise UserError(f"text file {name!r} ends in {path.suffix!r}; it must be one of {', '.join(SUFFIXES)}.")
    return _file(path)


def _file(path: Path) -> list[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"text file {str(path)!r} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"text file {str(path)!r} cannot be read: {error.strerror}; make it readable.") from error
    if path.suffix != ".jsonl":
        return [Document(path.as_posix(), text)]
    lines = enumerate(text.split("\n"), start=1)  # splitlines() would also break at U+2028, which JSON allows
    return [Document(f"{path.as_posix()}:{at}", _row(line, f"{path}:{at}")) for at, line in lines if line.strip()]


def _row(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); each line must be an object with a field 'text'.") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UserError(f"{where} has no string in a field 'text'; each line must be an object with one.")
    return row["text"]


def _hub(name: str) -> list[Document]:
    """The first HUB_ROWS rows of a data set."""
    given = name.split(":")
    path, split, column = given + ["train", "text"][len(given) - 1 :]
    owner, repository, *config = path.split("/")
    log(f"fetching up to {HUB_ROWS} rows of {name} from the hub")
    what = f"text {name!r} is no file, and as a hub data set it"
    remedy = f"correct it as {HUB_FORM}, connect to the hub, or use one of {', '.join(DEMO_CORPORA)}"
    found = stream_rows(what, remedy, path=f"{owner}/{repository}", name=config[0] if config else None, split=split)
    checked = (check_row(row, (column,), f"text {name!r}") for row in islice(found, HUB_ROWS))
    return [Document(f"{name}:{at}", str(row[column])) for at, row in enumerate(checked)]


def _published(name: str) -> list[Document]:
    """All documents of the test split, or of a file of one's own with its rows."""
    corpus, _, file = name.partition("=")
    published = PUBLISHED_CORPORA[corpus]
    log(f"reading {corpus} from {file or 'the hub'}")
    files = local_data_file(file) if file else published.files
    remedy = f"connect to the hub, name a file with its rows as {corpus}=FILE, or use one of {', '.join(DEMO_CORPORA)}"
    found = stream_file_rows(f"text {name!r} ({files})", remedy, files=files, where={})
    checked = (check_row(row, published.columns, f"text {name!r}") for row in found)
    return [Document(f"{corpus}/{title}", text) for title, text in published.read(checked)]
