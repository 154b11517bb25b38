"""The study's text: documents for the profile, and others that neither profile, trials nor validation have seen."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from baklava.data.documents import Document, load_documents
from baklava.data.windows import Splits, Window, cut_windows, make_splits, round_robin
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from benchmarks.fidelity.methods import PlanMaker, StudyMethod
from tuning.search.inputs import WINDOWS_PER_SPLIT

Split = Literal["test", "validation"]


@dataclass(frozen=True)
class StudyTexts:
    """The corpora of a study, and how windows are cut from them.

    Attributes:
        search_corpus: the corpus of the profile and of the search.
        test_corpora: names of corpora, with the number of windows of each.
        num_skipped_windows: windows at the start of each test corpus that are left out, since an earlier study has
            seen them and methods have changed since.
        controls: corpora that cannot tell plans apart, since their text hardly needs its context.
        context: tokens prefilled per window.
        continuation: tokens scored per window.
    """

    search_corpus: str = "botocore"
    test_corpora: tuple[tuple[str, int], ...] = (("botocore", 3), ("ifcraft", 3), ("factbook", 1))
    num_skipped_windows: int = 5
    controls: tuple[str, ...] = ("factbook",)
    context: int = 3072
    continuation: int = 512
    seed: int = 0


@dataclass(frozen=True)
class StudyWindows:
    """The windows of the profile, and the scored windows of each corpus."""

    calibration: tuple[Window, ...]
    scored: Mapping[str, tuple[Window, ...]]


def make_windows(texts: StudyTexts, split: Split, tokenizer: Any) -> StudyWindows:
    """Return the windows of a split: those of a search with this seed, or for the test those of unused documents.

    Raises:
        UserError: a text does not exist or is too short, or the search uses every document.
    """
    documents = load_documents([texts.search_corpus])
    lengths: dict[str, Any] = {"context": texts.context, "continuation": texts.continuation}
    splits = make_splits(
        documents, tokenizer, **lengths, seed=texts.seed, search=WINDOWS_PER_SPLIT, validation=WINDOWS_PER_SPLIT
    )
    if split == "validation":
        count = dict(texts.test_corpora).get(texts.search_corpus, WINDOWS_PER_SPLIT)
        return StudyWindows(splits.calibration, {texts.search_corpus: splits.validation[:count]})
    scored = {}
    for name, count in texts.test_corpora:
        unseen = unused_documents(documents, splits) if name == texts.search_corpus else load_documents([name])
        windows = _sample_windows(unseen, tokenizer, texts.num_skipped_windows + count, texts.seed, lengths)
        scored[name] = windows[texts.num_skipped_windows :]
    return StudyWindows(splits.calibration, scored)


def unused_documents(documents: Sequence[Document], splits: Splits) -> list[Document]:
    """Return the documents whose text is in no split, under any name; raise UserError if there are none."""
    names = {window.document for window in (*splits.calibration, *splits.search, *splits.validation)}
    used_texts = {document.text for document in documents if document.name in names}
    unused = [document for document in documents if document.text not in used_texts]
    if not unused:
        raise UserError(
            f"the search uses all {len(documents)} documents, which leaves none for the test; give more texts"
        )
    return unused


def _sample_windows(
    documents: Sequence[Document], tokenizer: Any, count: int, seed: int, lengths: Mapping[str, int]
) -> tuple[Window, ...]:
    """Return windows of shuffled documents; no document gives a second one before every document has given one."""
    by_document: dict[str, list[Window]] = {}
    for window in cut_windows(documents, tokenizer, **lengths, per_document=count):
        by_document.setdefault(window.document, []).append(window)
    names = sorted(by_document)
    random.Random(seed).shuffle(names)
    return round_robin([by_document[name] for name in names], count)


@dataclass(frozen=True)
class MethodPlans:
    """The plans of a method at a budget. If there are several, a window counts with its mean over them."""

    method: StudyMethod
    budget: float
    spec: str
    plans: tuple[BudgetPlan, ...]


@dataclass(frozen=True)
class SkippedMethod:
    """A method that has no plan at a budget, and why."""

    method: str
    budget: float
    reason: str


def plan_methods(
    methods: Sequence[StudyMethod], budgets: Sequence[float], tokens: int, make: PlanMaker
) -> tuple[list[MethodPlans], list[SkippedMethod]]:
    """Return the plans of all methods at all budgets for windows of `tokens`, and the methods without a plan."""
    planned: list[MethodPlans] = []
    skipped: list[SkippedMethod] = []
    for method in methods:
        for budget in (budget for budget in budgets if budget in (method.budgets or budgets)):
            try:
                spec, plans = method.plans(budget, make)
                _check_plans(plans, budget, tokens)
                planned.append(MethodPlans(method, budget, spec, plans))
            except UserError as error:
                skipped.append(SkippedMethod(method.name, budget, str(error)))
    return planned, skipped


def _check_plans(plans: Sequence[BudgetPlan], budget: float, tokens: int) -> None:
    for plan in plans:
        if plan.provenance.seed not in (None, StudyTexts().seed):
            seed = plan.provenance.seed
            raise UserError(f"the plan was searched with seed {seed}, which saw other text; search with seed 0")
        if plan.context_length != tokens:
            raise UserError(f"the plan was made for {plan.context_length} tokens, but windows have {tokens}")
        if plan.ratio > budget:
            raise UserError(f"the plan takes {plan.ratio:.2%} of the bytes, more than the budget of {budget:.2%}")
