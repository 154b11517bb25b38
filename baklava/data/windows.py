"""Token windows of documents: a context to prefill and a continuation to score."""

import random
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveInt

from baklava.console import log
from baklava.data.documents import Document, content_digest
from baklava.errors import UserError, first_duplicate
from baklava.serialization import atomic_write_text

SHARED_RUN_TOKENS = 32
"""Tokens in a row by which windows are compared; a short window is compared by runs of half of it."""
MAX_SHARED_FRACTION = 1 / 3
"""Part of a window that may be in another split, and of a document's windows: texts of one kind share phrases."""


@dataclass(frozen=True)
class Window:
    """`ids[:context_length]` are prefilled, the rest is the continuation, which is scored."""

    name: str
    document: str
    ids: tuple[int, ...]
    context_length: int

    @property
    def continuation_length(self) -> int:
        """Number of tokens that are scored."""
        return len(self.ids) - self.context_length


@dataclass(frozen=True)
class Splits:
    """Windows of different documents: for the profile, for the trials, and for the choice among the best trials."""

    calibration: tuple[Window, ...]
    search: tuple[Window, ...]
    validation: tuple[Window, ...]


def cut_windows(
    documents: Sequence[Document], tokenizer: Any, *, context: int, continuation: int, per_document: int = 1
) -> list[Window]:
    """Cut consecutive windows from the start of each document, up to `per_document`; skip documents that are too short.

    Raises:
        UserError: no document is long enough, or a length is not positive.
    """
    if context < 1 or continuation < 1:
        raise UserError(f"context {context} and continuation {continuation} must both be at least 1 token")
    windows = [w for d in documents for w in _cut_document(d, tokenizer, context, continuation, per_document)]
    if not windows:
        longest = max(documents, key=lambda document: len(document.text))
        tokens = len(_encode(longest, tokenizer))
        raise UserError(
            f"the longest text, {longest.name}, has {tokens} tokens, but a window needs {context} of context + "
            f"{continuation} of continuation; give longer texts or lower --context or --continuation"
        )
    return windows


def make_splits(
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    context: int,
    continuation: int,
    seed: int,
    calibration: int = 3,
    search: int = 4,
    validation: int = 4,
    seen: Sequence[Window] = (),
) -> Splits:
    """Distribute shuffled documents over the three splits, so that no document and no content is in two of them.

    If there are fewer documents than windows, several windows are cut per document, and each split still gets its own
    documents. Windows that share content with another document are left out, and so are documents that have many such
    windows; see `MAX_SHARED_FRACTION`.

    Args:
        documents: What the windows are cut from.
        tokenizer: Of the model.
        context: Tokens of a window that are prefilled.
        continuation: Tokens of a window that are scored.
        seed: Of the order of the documents.
        calibration: Windows for the profile.
        search: Windows for the trials.
        validation: Windows for the choice among the best trials.
        seen: Windows whose content no split may have, such as those of a test.

    Raises:
        UserError: fewer than three documents are long enough and differ.
    """
    sizes = (calibration, search, validation)
    by_document = _windows_by_document(documents, tokenizer, context, continuation, sum(sizes))
    names = sorted(by_document)
    random.Random(seed).shuffle(names)
    by_document = _without_shared_content({name: by_document[name] for name in names}, sum(sizes), seen)
    names = list(by_document)
    if len(names) < 3:
        raise UserError(
            f"{len(names)} of {len(documents)} texts are long enough for a window of {context} + {continuation} "
            "tokens and differ, but profile, trials and validation need one each; give more texts or lower --context"
        )
    splits, start = [], 0
    for size, num_documents in zip(sizes, _documents_per_split(len(names), sizes), strict=True):
        own = names[start : start + num_documents]
        splits.append(round_robin([by_document[name] for name in own], size))
        start += num_documents
    return Splits(*splits)


def _documents_per_split(documents: int, sizes: tuple[int, ...]) -> list[int]:
    """Return one document per window if there are enough, otherwise in proportion, at least one per split."""
    if documents >= sum(sizes):
        return list(sizes)
    counts = [max(1, documents * size // sum(sizes)) for size in sizes]
    while sum(counts) > documents:
        counts[counts.index(max(counts))] -= 1
    return counts


def round_robin(groups: Sequence[Sequence[Window]], count: int) -> tuple[Window, ...]:
    """Return up to `count` windows: the first of each group, then the second of each, and so on."""
    ordered = [window for nth in zip_longest(*groups) for window in nth if window is not None]
    return tuple(ordered[:count])


def _windows_by_document(
    documents: Sequence[Document], tokenizer: Any, context: int, continuation: int, count: int
) -> dict[str, list[Window]]:
    """Return up to `count` windows of each document that is long enough; documents of one content count once."""
    distinct = {content_digest(document.text): document for document in documents}.values()
    by_document: dict[str, list[Window]] = {}
    for window in cut_windows(
        list(distinct), tokenizer, context=context, continuation=continuation, per_document=count
    ):
        by_document.setdefault(window.document, []).append(window)
    return by_document


def _without_shared_content(
    by_document: dict[str, list[Window]], count: int, seen: Sequence[Window]
) -> dict[str, list[Window]]:
    """Return up to `count` documents whose windows share no content with each other, and none of `seen`.

    A licence at the start of each text costs its first window, while a copy with another start is left out.
    """
    lengths = [len(window.ids) for window in (*seen, *(window for own in by_document.values() for window in own))]
    run = min(SHARED_RUN_TOKENS, min(lengths) // 2)
    seen_runs = {found for window in seen for found in _runs(window, run)}
    known = set[int]()
    kept = dict[str, list[Window]]()
    for name, windows in by_document.items():
        runs = {window: _runs(window, run) for window in windows}
        own = [window for window in windows if _shared_fraction(runs[window], known) <= MAX_SHARED_FRACTION]
        was_seen = any(_shared_fraction(runs[window], seen_runs) > MAX_SHARED_FRACTION for window in windows)
        if not was_seen and len(windows) - len(own) <= MAX_SHARED_FRACTION * len(windows):
            kept[name] = own
            known.update(found for window in windows for found in runs[window])
        if len(kept) == count:
            break
    if len(kept) < min(count, len(by_document)):
        log(f"windows: {len(by_document) - len(kept)} texts are left out, since they share content with others")
    return kept


def _shared_fraction(runs: Sequence[int], known: Set[int]) -> float:
    return sum(found in known for found in runs) / len(runs)


def _runs(window: Window, length: int) -> list[int]:
    """Return the hashes of all runs of so many tokens."""
    return [hash(window.ids[start : start + length]) for start in range(len(window.ids) - length + 1)]


def _cut_document(
    document: Document, tokenizer: Any, context: int, continuation: int, max_windows: int
) -> list[Window]:
    start = bos_tokens(tokenizer)
    body = _encode(document, tokenizer)
    step = context + continuation - len(start)
    count = min(max_windows, len(body) // step)
    return [
        Window(f"{document.name}:{i}", document.name, (*start, *body[i * step : (i + 1) * step]), context)
        for i in range(count)
    ]


def _encode(document: Document, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def bos_tokens(tokenizer: Any) -> list[int]:
    """Return the token that the tokenizer puts before every text, if any; models rely on it as an attention sink."""
    ids = tokenizer("a")["input_ids"]
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


class _WindowRecord(BaseModel):
    name: str
    ids: tuple[int, ...]
    document: str | None = None


class _WindowFile(BaseModel):
    context: PositiveInt
    continuation: PositiveInt
    windows: tuple[_WindowRecord, ...]


def write_windows(path: Path, windows: Sequence[Window]) -> None:
    """Write windows of one length to a file for `read_windows` and other programs."""
    records = tuple(_WindowRecord(name=window.name, ids=window.ids, document=window.document) for window in windows)
    content = _WindowFile(
        context=windows[0].context_length, continuation=windows[0].continuation_length, windows=records
    )
    atomic_write_text(path, content.model_dump_json() + "\n")


def read_windows(path: str | Path, vocabulary: int) -> list[Window]:
    """Read a file `{"context": N, "continuation": M, "windows": [{"name", "ids": [N + M ids]}]}`.

    A window may name its "document", since windows of one document are not independent; by default each has its own.

    Raises:
        UserError: the file has another form, a window another length, or an id is outside the vocabulary.
    """
    try:
        content = _WindowFile.model_validate_json(Path(path).read_text(), strict=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f'cannot read windows from {path} ({type(error).__name__}); the file holds {{"context": N, '
            '"continuation": M, "windows": [{"name": ..., "ids": [N + M token ids]}]}'
        ) from None
    length = content.context + content.continuation
    windows = [
        Window(record.name, record.document or record.name, record.ids, content.context) for record in content.windows
    ]
    for window in windows:
        if len(window.ids) != length:
            raise UserError(f"window {window.name} in {path} has {len(window.ids)} ids, not {length}; cut it again")
        if not all(0 <= token < vocabulary for token in window.ids):
            raise UserError(
                f"window {window.name} in {path} has ids outside 0 to {vocabulary - 1}; use this model's ids"
            )
    if duplicate := first_duplicate(window.name for window in windows):
        raise UserError(f"{path} has two windows named {duplicate!r}; give each a name of its own")
    if not windows:
        raise UserError(f"{path} has no windows; give at least one")
    return windows
