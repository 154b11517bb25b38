"""Token windows: a context to prefill and a continuation to score, cut from documents."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveInt

from baklava.data.documents import Document
from baklava.errors import UserError, first_duplicate
from baklava.serialization import atomic_write_text


@dataclass(frozen=True)
class Window:
    """`ids[:context]` are prefilled, the rest is the continuation that a score looks at."""

    name: str
    document: str
    ids: tuple[int, ...]
    context_length: int

    @property
    def continuation_length(self) -> int:
        """Tokens scored."""
        return len(self.ids) - self.context_length


@dataclass(frozen=True)
class Splits:
    """Windows of different documents: for the profile, for the trials, and for choosing among the best trials."""

    calibration: tuple[Window, ...]
    search: tuple[Window, ...]
    validation: tuple[Window, ...]


def cut_windows(
    documents: Sequence[Document], tokenizer: Any, *, context: int, continuation: int, per_document: int = 1
) -> list[Window]:
    """Windows from the start of each document, one after the other; documents too short for one are left out.

    Raises:
        UserError: no document is long enough, or a length is not positive.
    """
    if context < 1 or continuation < 1:
        raise UserError(f"context {context} and continuation {continuation} must both be at least 1 token")
    cut = [w for d in documents for w in _of_document(d, tokenizer, context, continuation, per_document)]
    if not cut:
        longest = max(documents, key=lambda document: len(document.text))
        tokens = len(_body(longest, tokenizer))
        raise UserError(
            f"the longest text, {longest.name}, has {tokens} tokens, but a window needs {context} of context + "
            f"{continuation} of continuation; give longer texts or lower --context or --continuation"
        )
    return cut


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
) -> Splits:
    """Deal shuffled documents out to the three splits; no document is in two of them.

    A text with fewer documents than windows are asked for is cut into several windows per document, and each split
    still gets documents of its own. Documents with the same text count once.

    Raises:
        UserError: fewer than three documents are long enough.
    """
    by_document = _by_document(documents, tokenizer, context, continuation, calibration + search + validation)
    names = sorted(by_document)
    if len(names) < 3:
        raise UserError(
            f"{len(names)} of {len(documents)} texts are long enough for a window of {context} + {continuation} "
            "tokens, but profile, trials and validation need one each; give more texts or lower --context"
        )
    random.Random(seed).shuffle(names)
    asked = (calibration, search, validation)
    shares = _shares(len(names), asked)
    dealt, start = [], 0
    for count, share in zip(asked, shares, strict=True):
        dealt.append(round_robin([by_document[name] for name in names[start : start + share]], count))
        start += share
    return Splits(*dealt)


def _shares(documents: int, asked: tuple[int, ...]) -> list[int]:
    """Documents per split: one a window where there are enough, else in proportion, at least one each."""
    if documents >= sum(asked):
        return list(asked)
    shares = [max(1, documents * count // sum(asked)) for count in asked]
    while sum(shares) > documents:
        shares[shares.index(max(shares))] -= 1
    return shares


def round_robin(groups: Sequence[Sequence[Window]], count: int) -> tuple[Window, ...]:
    """At most `count` windows, one of each group before a second one of any."""
    deepest = max(len(group) for group in groups)
    dealt = [group[depth] for depth in range(deepest) for group in groups if depth < len(group)]
    return tuple(dealt[:count])


def _by_document(
    documents: Sequence[Document], tokenizer: Any, context: int, continuation: int, wanted: int
) -> dict[str, list[Window]]:
    """Windows of each document that is long enough: one each, or more where the documents are few."""
    distinct = {document.text: document for document in documents}.values()
    found: dict[str, list[Window]] = {}
    for window in cut_windows(list(distinct), tokenizer, context=context, continuation=continuation, per_document=wanted):
        found.setdefault(window.document, []).append(window)
    most = -(-wanted // len(found))
    return {name: cut[:most] for name, cut in found.items()}


def _of_document(document: Document, tokenizer: Any, context: int, continuation: int, most: int) -> list[Window]:
    start = bos_tokens(tokenizer)
    body = _body(document, tokenizer)
    step = context + continuation - len(start)
    count = min(most, len(body) // step)
    return [
        Window(f"{document.name}:{i}", document.name, (*start, *body[i * step : (i + 1) * step]), context)
        for i in range(count)
    ]


def _body(document: Document, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def bos_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: models rely on it as an attention sink."""
    ids = tokenizer("a")["input_ids"]
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


class _NamedIds(BaseModel):
    name: str
    ids: tuple[int, ...]
    document: str | None = None


class _WindowFile(BaseModel):
    context: PositiveInt
    continuation: PositiveInt
    windows: tuple[_NamedIds, ...]


def write_windows(path: Path, windows: Sequence[Window]) -> None:
    """Write windows of one length to a file that `read_windows` and scripts of other people read."""
    ids = tuple(_NamedIds(name=window.name, ids=window.ids, document=window.document) for window in windows)
    content = _WindowFile(context=windows[0].context_length, continuation=windows[0].continuation_length, windows=ids)
    atomic_write_text(path, content.model_dump_json() + "\n")


def read_windows(path: str | Path, vocabulary: int) -> list[Window]:
    """Windows from a file `{"context": N, "continuation": M, "windows": [{"name", "ids": [N + M ids]}]}`.

    A window may name its "document"; windows of one document are not independent. Else each counts as one.

    Raises:
        UserError: not such a file, a window of another length, or an id outside the vocabulary.
    """
    try:
        content = _WindowFile.model_validate_json(Path(path).read_text(), strict=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f'cannot read windows from {path} ({type(error).__name__}); the file holds {{"context": N, '
            '"continuation": M, "windows": [{"name": ..., "ids": [N + M token ids]}]}'
        ) from None
    length = content.context + content.continuation
    cut = [Window(each.name, each.document or each.name, each.ids, content.context) for each in content.windows]
    for window in cut:
        if len(window.ids) != length:
            raise UserError(f"window {window.name} in {path} has {len(window.ids)} ids, not {length}; cut it again")
        if not all(0 <= token < vocabulary for token in window.ids):
            raise UserError(
                f"window {window.name} in {path} has ids outside 0 to {vocabulary - 1}; use this model's ids"
            )
    if twice := first_duplicate(window.name for window in cut):
        raise UserError(f"{path} has two windows named {twice!r}; give each a name of its own")
    if not cut:
        raise UserError(f"{path} holds no windows; give at least one")
    return cut
