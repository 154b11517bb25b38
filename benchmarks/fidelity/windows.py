"""Which text: documents for the profile, and others that neither profile, trials nor validation saw."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from baklava.errors import UserError
from baklava.texts import Document, documents
from baklava.windows import Splits, Window, round_robin, split, windows
from tuning.prepare import WINDOWS

Split = Literal["test", "validation"]


@dataclass(frozen=True)
class Texts:
    """What is asked for: of `searched` come the profile and the search, `test` is how many windows of each corpus.

    The first `seen` windows of each test corpus are left out: an earlier study looked at them, and methods have changed
    since. `controls` are corpora that cannot tell plans apart, since their text hardly needs its context.
    """

    searched: str = "botocore"
    test: tuple[tuple[str, int], ...] = (("botocore", 3), ("ifcraft", 3), ("factbook", 1))
    seen: int = 5
    controls: tuple[str, ...] = ("factbook",)
    context: int = 3072
    continuation: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Cut:
    """Windows for the profile, and those that are scored by corpus."""

    calibration: tuple[Window, ...]
    scored: Mapping[str, tuple[Window, ...]]


def cut(texts: Texts, which: Split, tokenizer: Any) -> Cut:
    """The windows of a split: dealt as a search deals them with this seed, those of the test from what is left.

    Raises:
        UserError: a text that does not exist or is too short, or no document that a search leaves.
    """
    searched = documents([texts.searched])
    lengths = {"context": texts.context, "continuation": texts.continuation}
    splits = split(searched, tokenizer, **lengths, seed=texts.seed, search=WINDOWS, validation=WINDOWS)
    if which == "validation":
        count = dict(texts.test).get(texts.searched, WINDOWS)
        return Cut(splits.calibration, {texts.searched: splits.validation[:count]})
    scored = {}
    for name, count in texts.test:
        unseen = untouched(searched, splits) if name == texts.searched else documents([name])
        scored[name] = _drawn(unseen, tokenizer, texts.seen + count, texts.seed, lengths)[texts.seen :]
    return Cut(splits.calibration, scored)


def untouched(of: Sequence[Document], splits: Splits) -> list[Document]:
    """The documents that no split has a window of, under their own or another name; raises UserError for none."""
    names = {window.document for window in (*splits.calibration, *splits.search, *splits.validation)}
    texts = {document.text for document in of if document.name in names}
    left = [document for document in of if document.text not in texts]
    if not left:
        raise UserError(f"the search takes all {len(of)} documents, which leaves none for the test; give more texts")
    return left


def _drawn(
    of: Sequence[Document], tokenizer: Any, count: int, seed: int, lengths: Mapping[str, int]
) -> tuple[Window, ...]:
    """Windows of shuffled documents, a second one of any only when each has given one."""
    by_document: dict[str, list[Window]] = {}
    for window in windows(of, tokenizer, **lengths, per_document=count):
        by_document.setdefault(window.document, []).append(window)
    names = sorted(by_document)
    random.Random(seed).shuffle(names)
    return round_robin([by_document[name] for name in names], count)
