"""Who takes part: one list, a line a contestant."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from typing_extensions import override

from baklava.allocation import shuffled
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan

Group = Literal["published", "packed", "ours", "control"]
"""As published in 16 bits; with heavy hitters in 4 bits; ours; and what ours is checked against."""

Maker = Callable[[str], BudgetPlan]
"""Makes the plan of a file or of METHOD[+EVICTION][@BITS]:BUDGET."""

BUDGETS = (0.5, 0.3, 0.2, 0.125, 0.0625, 0.03125)


@dataclass(frozen=True)
class Contestant(ABC):
    """A way to spend any of `budgets`; all budgets where that is None."""

    name: str
    label: str
    group: Group
    budgets: tuple[float, ...] | None = None

    @abstractmethod
    def plans(self, budget: float, make: Maker) -> tuple[str, tuple[BudgetPlan, ...]]:
        """Where the plans at this budget come from, and the plans: several where one of them is a draw.

        Raises:
            UserError: there is none at this budget.
        """


@dataclass(frozen=True)
class Method(Contestant):
    """An allocation and an eviction method; the name is how `--plan` says it, without the budget."""

    @override
    def plans(self, budget: float, make: Maker) -> tuple[str, tuple[BudgetPlan, ...]]:
        spec = f"{self.name}:{budget:g}"
        return spec, (make(spec),)


@dataclass(frozen=True)
class Champion(Contestant):
    """What the search found, one file a budget; at budgets that were not searched, the method named here if any."""

    folder: Path = Path("plans")
    files: tuple[tuple[float, str], ...] = ()
    unsearched: tuple[tuple[float, str], ...] = ()

    @override
    def plans(self, budget: float, make: Maker) -> tuple[str, tuple[BudgetPlan, ...]]:
        path = self.folder / dict(self.files).get(budget, f"demo-{100 * budget:g}.json")
        if not path.exists() and budget in dict(self.unsearched):
            spec = dict(self.unsearched)[budget]
            return spec, (make(spec),)
        return str(path), (make(str(path)),)


@dataclass(frozen=True)
class Shuffled(Contestant):
    """The budgets of another's plan dealt to random heads: what knowing the heads is worth."""

    of: Contestant | None = None
    seeds: tuple[int, ...] = (0, 1, 2)

    @override
    def plans(self, budget: float, make: Maker) -> tuple[str, tuple[BudgetPlan, ...]]:
        assert self.of is not None
        spec, (plan,) = self.of.plans(budget, make)
        return f"{spec}, dealt to random heads", tuple(shuffled(plan, seed) for seed in self.seeds)


UNSEARCHED = "greedy(measure=text,bits=any)+heavy_hitter(sinks=1,centroids=4)@k5v4"
"""What ours is at budgets that nobody searched: the first trial that wins where much is kept."""

OURS = Champion(
    "ours",
    "ours, searched",
    "ours",
    files=((0.03125, "demo-3.1.json"),),
    unsearched=tuple((budget, f"{UNSEARCHED}:{budget:g}") for budget in (0.5, 0.2)),
)
BASELINE = Method("uniform", "uniform, sinks + recent", "published")
"""What everything began with: the same for every head, the first tokens and the newest."""

CONTESTANTS: Mapping[str, Contestant] = {
    each.name: each
    for each in (
        BASELINE,
        Method("uniform+heavy_hitter", "uniform, heavy hitters", "published"),
        Method("pyramidkv", "PyramidKV, sinks + recent", "published"),
        Method("pyramidkv+heavy_hitter", "PyramidKV, heavy hitters", "published"),
        Method("squeeze_attention", "SqueezeAttention, sinks + recent", "published"),
        Method("squeeze_attention+heavy_hitter", "SqueezeAttention, heavy hitters", "published"),
        Method("baklava", "BaKlaVa, sinks + recent", "published"),
        Method("baklava+heavy_hitter", "BaKlaVa, heavy hitters", "published"),
        Method("duo_attention", "DuoAttention", "published"),
        Method("adakv+heavy_hitter", "head-adaptive, heavy hitters", "published"),
        Method("uniform@4", "uniform, sinks + recent, 4 bits", "packed"),
        Method("uniform+heavy_hitter@4", "uniform, 4 bits", "packed"),
        Method("greedy+heavy_hitter@4", "greedy on curves, 4 bits", "packed"),
        Method("heavy_hitter_counts+heavy_hitter@4", "heavy-hitter counts, 4 bits", "packed"),
        Method("reconstruction_counts+heavy_hitter@4", "reconstruction counts, 4 bits", "packed"),
        OURS,
        Shuffled("shuffled", "ours, heads shuffled", "control", budgets=(0.125,), of=OURS),
    )
}


CONTROLLED = (BASELINE.name, OURS.name, "shuffled")
"""Who is scored on corpora that are controls: they are to show that such text cannot tell plans apart, once."""


def chosen(names: Sequence[str] | None) -> list[Contestant]:
    """The contestants of these names, all by default; raises UserError for a name that is none."""
    for name in names or ():
        if name not in CONTESTANTS:
            raise UserError(f"--methods {name}: no such contestant; choose among {', '.join(CONTESTANTS)}")
    return [each for name, each in CONTESTANTS.items() if names is None or name in names]
