"""The inputs of the study: the methods that it compares, and text that no profile, trial or validation has seen."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from typing_extensions import override

from baklava.allocation import shuffled
from baklava.data.documents import Document, load_documents
from baklava.data.windows import Splits, Window, cut_windows, make_splits, round_robin
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from tuning.search.inputs import WINDOWS_PER_SPLIT

Group = Literal["published", "packed", "searched", "control"]
"""Allocation methods as published, in 16 bits; methods in 4 bits; searched plans; and controls for these."""

PlanMaker = Callable[[str], BudgetPlan]
"""Return the plan of a file or of METHOD[+EVICTION][@BITS]:BUDGET."""

BUDGETS = (0.5, 0.3, 0.2, 0.125, 0.0625, 0.03125, 0.015625)


@dataclass(frozen=True)
class StudyMethod(ABC):
    """A method that makes plans for the given `budgets`, or for every budget if that is None."""

    name: str
    label: str
    group: Group
    budgets: tuple[float, ...] | None = None

    @abstractmethod
    def plans(self, budget: float, make: PlanMaker) -> tuple[str, tuple[BudgetPlan, ...]]:
        """Return the origin of the plans at this budget, and the plans: several if each is a random draw.

        Raises:
            UserError: the method has no plan at this budget.
        """


@dataclass(frozen=True)
class NamedMethod(StudyMethod):
    """An allocation and an eviction method; the name is that of `--plan`, without the budget."""

    @override
    def plans(self, budget: float, make: PlanMaker) -> tuple[str, tuple[BudgetPlan, ...]]:
        spec = f"{self.name}:{budget:g}"
        return spec, (make(spec),)


@dataclass(frozen=True)
class SearchedPlans(StudyMethod):
    """Plans that a search found, one file per budget; `fallbacks` are specs for budgets that were not searched."""

    folder: Path = Path("plans")
    files: tuple[tuple[float, str], ...] = ()
    fallbacks: tuple[tuple[float, str], ...] = ()

    @override
    def plans(self, budget: float, make: PlanMaker) -> tuple[str, tuple[BudgetPlan, ...]]:
        path = self.folder / dict(self.files).get(budget, f"demo-{100 * budget:g}.json")
        if not path.exists() and budget in dict(self.fallbacks):
            spec = dict(self.fallbacks)[budget]
            return spec, (make(spec),)
        return str(path), (make(str(path)),)


@dataclass(frozen=True)
class ShuffledHeads(StudyMethod):
    """The head budgets of another method's plan, dealt to random heads: shows what it is worth to know the heads."""

    source: StudyMethod | None = None
    seeds: tuple[int, ...] = (0, 1, 2)

    @override
    def plans(self, budget: float, make: PlanMaker) -> tuple[str, tuple[BudgetPlan, ...]]:
        assert self.source is not None
        spec, (plan,) = self.source.plans(budget, make)
        return f"{spec}, dealt to random heads", tuple(shuffled(plan, seed) for seed in self.seeds)


FALLBACK_SPEC = (
    "greedy(measure=text,bits=any)+attention_matching("
    "sinks=1,centroids=4,eviction_interval=8,residual_length=16,fit_references=256)@k5v4"
)
"""Stands in for a searched plan at budgets without a search: one of the first trials, which wins at large budgets."""

SEARCHED = SearchedPlans(
    "searched",
    "baklava, searched",
    "searched",
    files=((0.03125, "demo-3.1.json"), (0.015625, "demo-1.6.json")),
    fallbacks=tuple((budget, f"{FALLBACK_SPEC}:{budget:g}") for budget in (0.5, 0.2)),
)
BASELINE = NamedMethod("uniform", "uniform, sinks + recent", "published")
"""The same budget for every head, spent on the first tokens and the newest."""

EVICTIONS = {
    "heavy_hitter": "heavy hitters",
    "attention_matching(fit_references=256)": "matching",
}
"""Eviction methods that allocation methods are combined with: the usual one, and our own with fitted values."""

ALLOCATIONS_16_BITS = {
    "uniform": "uniform",
    "pyramidkv": "PyramidKV",
    "squeeze_attention": "SqueezeAttention",
    "adakv": "AdaKV",
    "baklava": "BaKlaVa",
}
"""Published allocation methods, which store 16 bits."""

ALLOCATIONS_4_BITS = {
    "uniform": "uniform",
    "heavy_hitter_counts": "heavy-hitter counts",
    "reconstruction_counts": "reconstruction counts",
    "greedy": "greedy on loss curves",
}
"""Allocation methods that are compared in 4 bits."""


def _combinations(allocations: Mapping[str, str], bits: str, group: Group) -> list[NamedMethod]:
    in_bits = f", {bits[1:]} bits" if bits else ""
    return [
        NamedMethod(f"{allocation}+{eviction}{bits}", f"{label}, {kept}{in_bits}", group)
        for allocation, label in allocations.items()
        for eviction, kept in EVICTIONS.items()
    ]


METHODS: Mapping[str, StudyMethod] = {
    method.name: method
    for method in (
        BASELINE,
        NamedMethod("duo_attention", "DuoAttention", "published"),
        *_combinations(ALLOCATIONS_16_BITS, "", "published"),
        NamedMethod("adakv+kvzip", "AdaKV, KVzip's order", "published"),
        NamedMethod("uniform@4", "uniform, sinks + recent, 4 bits", "packed"),
        *_combinations(ALLOCATIONS_4_BITS, "@4", "packed"),
        NamedMethod("reconstruction_counts+kvzip@4", "reconstruction counts, KVzip's order, 4 bits", "packed"),
        SEARCHED,
        ShuffledHeads("shuffled", "baklava, heads shuffled", "control", budgets=(0.125,), source=SEARCHED),
    )
}


CONTROL_METHODS = (BASELINE.name, SEARCHED.name, "shuffled")
"""The methods scored on control corpora: enough to show that such text cannot tell plans apart."""


def select_methods(names: Sequence[str] | None) -> list[StudyMethod]:
    """Return the methods of these names, or all for None; raise UserError for an unknown name."""
    for name in names or ():
        if name not in METHODS:
            raise UserError(f"--methods {name}: no such method; choose among {', '.join(METHODS)}")
    return [method for name, method in METHODS.items() if names is None or name in names]


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
    test_corpora: tuple[tuple[str, int], ...] = (("botocore", 8), ("ifcraft", 4), ("factbook", 1))
    num_skipped_windows: int = 8
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
