"""Which text: documents for the profile, and others that neither profile, trials nor validation saw."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from baklava.data.documents import Document, load_documents
from baklava.data.windows import Splits, Window, cut_windows, make_splits, round_robin
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from benchmarks.fidelity.methods import Contestant, Maker
from tuning.search.inputs import WINDOWS_PER_SPLIT

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
    searched = load_documents([texts.searched])
    lengths = {"context": texts.context, "continuation": texts.continuation}
    splits = make_splits(searched, tokenizer, **lengths, seed=texts.seed, search=WINDOWS_PER_SPLIT, validation=WINDOWS_PER_SPLIT)
    if which == "validation":
        count = dict(texts.test).get(texts.searched, WINDOWS_PER_SPLIT)
        return Cut(splits.calibration, {texts.searched: splits.validation[:count]})
    scored = {}
    for name, count in texts.test:
        unseen = untouched(searched, splits) if name == texts.searched else load_documents([name])
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
    for window in cut_windows(of, tokenizer, **lengths, per_document=count):
        by_document.setdefault(window.document, []).append(window)
    names = sorted(by_document)
    random.Random(seed).shuffle(names)
    return round_robin([by_document[name] for name in names], count)


@dataclass(frozen=True)
class Entry:
    """A contestant at a budget. Of several plans, each window counts with their mean."""

    contestant: Contestant
    budget: float
    spec: str
    plans: tuple[BudgetPlan, ...]


@dataclass(frozen=True)
class LeftOut:
    """A contestant that a budget does not hold, and why."""

    method: str
    budget: float
    reason: str


def entries(
    contestants: Sequence[Contestant], budgets: Sequence[float], tokens: int, make: Maker
) -> tuple[list[Entry], list[LeftOut]]:
    """All contestants at all budgets of windows of `tokens`, and those that have no plan there."""
    found: list[Entry] = []
    left_out: list[LeftOut] = []
    for contestant in contestants:
        for budget in (budget for budget in budgets if budget in (contestant.budgets or budgets)):
            try:
                spec, plans = contestant.plans(budget, make)
                _check(plans, budget, tokens)
                found.append(Entry(contestant, budget, spec, plans))
            except UserError as error:
                left_out.append(LeftOut(contestant.name, budget, str(error)))
    return found, left_out


def _check(plans: Sequence[BudgetPlan], budget: float, tokens: int) -> None:
    for plan in plans:
        if plan.provenance.seed not in (None, Texts().seed):
            seed = plan.provenance.seed
            raise UserError(f"the plan was searched with seed {seed}, which saw other text; search with seed 0")
        if plan.context_length != tokens:
            raise UserError(f"the plan was made for {plan.context_length} tokens, but windows have {tokens}")
        if plan.ratio > budget:
            raise UserError(f"the plan takes {plan.ratio:.2%} of the bytes, more than the budget of {budget:.2%}")
