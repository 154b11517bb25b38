"""The methods that the study compares."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from typing_extensions import override

from baklava.allocation import shuffled
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan

Group = Literal["published", "packed", "searched", "control"]
"""Methods as published, in 16 bits; methods with heavy hitters in 4 bits; searched plans; and controls for these."""

PlanMaker = Callable[[str], BudgetPlan]
"""Return the plan of a file or of METHOD[+EVICTION][@BITS]:BUDGET."""

BUDGETS = (0.5, 0.3, 0.2, 0.125, 0.0625, 0.03125)


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


FALLBACK_SPEC = "greedy(measure=text,bits=any)+heavy_hitter(sinks=1,centroids=4)@k5v4"
"""Stands in for a searched plan at budgets without a search: a search's first trial, which wins at large budgets."""

SEARCHED = SearchedPlans(
    "searched",
    "baklava, searched",
    "searched",
    files=((0.03125, "demo-3.1.json"),),
    fallbacks=tuple((budget, f"{FALLBACK_SPEC}:{budget:g}") for budget in (0.5, 0.2)),
)
BASELINE = NamedMethod("uniform", "uniform, sinks + recent", "published")
"""The same budget for every head, spent on the first tokens and the newest."""

METHODS: Mapping[str, StudyMethod] = {
    method.name: method
    for method in (
        BASELINE,
        NamedMethod("uniform+heavy_hitter", "uniform, heavy hitters", "published"),
        NamedMethod("pyramidkv", "PyramidKV, sinks + recent", "published"),
        NamedMethod("pyramidkv+heavy_hitter", "PyramidKV, heavy hitters", "published"),
        NamedMethod("squeeze_attention", "SqueezeAttention, sinks + recent", "published"),
        NamedMethod("squeeze_attention+heavy_hitter", "SqueezeAttention, heavy hitters", "published"),
        NamedMethod("baklava", "BaKlaVa, sinks + recent", "published"),
        NamedMethod("baklava+heavy_hitter", "BaKlaVa, heavy hitters", "published"),
        NamedMethod("duo_attention", "DuoAttention", "published"),
        NamedMethod("adakv+heavy_hitter", "AdaKV, heavy hitters", "published"),
        NamedMethod("uniform@4", "uniform, sinks + recent, 4 bits", "packed"),
        NamedMethod("uniform+heavy_hitter@4", "uniform, heavy hitters, 4 bits", "packed"),
        NamedMethod("greedy+heavy_hitter@4", "greedy on loss curves, 4 bits", "packed"),
        NamedMethod("heavy_hitter_counts+heavy_hitter@4", "heavy-hitter counts, 4 bits", "packed"),
        NamedMethod("reconstruction_counts+heavy_hitter@4", "reconstruction counts, 4 bits", "packed"),
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
