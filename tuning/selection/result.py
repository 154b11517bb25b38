"""The front as files: every plan on it, and what each of them holds and loses."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from baklava.plan.budget_plan import BudgetPlan
from baklava.serialization import FrozenModel, atomic_write_text
from tuning.selection.ablation import Ablation, format_ratio
from tuning.selection.param_importance import param_importances
from tuning.selection.promotion import RegisteredPlan
from tuning.selection.validation import ValidatedPlan, ValidationResult
from tuning.study.settings import SearchSettings
from tuning.study.trial import TrialRecord

FRONT_FILE, FRONT_FOLDER = "front.json", "front"


class Point(FrozenModel):
    """A plan that no other one beats in bytes and loss, and in seconds of a decoding step where those are counted.

    The losses are means on the validation windows.

    `plan` is its file, as seen from the folder of the search; `chosen` marks the one that became plan.json.
    """

    plan: str
    name: str
    ratio: float
    bytes_per_sequence: int
    kl: float
    kl_geometric: float
    dnll: float
    ppl: float
    decode_seconds: float | None = None
    chosen: bool


class Front(FrozenModel):
    """The points by size, the smallest first."""

    points: tuple[Point, ...]


def write_front(out: Path, entries: Sequence[ValidatedPlan], plans: Sequence[BudgetPlan], winner: ValidatedPlan) -> None:
    """Write a plan file per point, then the list of them."""
    folder = out / FRONT_FOLDER
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("plan-*.json"):
        stale.unlink()
    names = [f"{FRONT_FOLDER}/plan-{number:02}.json" for number in range(1, len(entries) + 1)]
    for name, plan in zip(names, plans, strict=True):
        plan.write(out / name)
    points = tuple(_point(name, entry, entry is winner) for name, entry in zip(names, entries, strict=True))
    atomic_write_text(out / FRONT_FILE, Front(points=points).model_dump_json(indent=1) + "\n")


def _point(file: str, entry: ValidatedPlan, chosen: bool) -> Point:
    plan, metrics = entry.candidate.plan, entry.metrics
    losses = {name: metrics[name] for name in ("kl", "kl_geometric", "dnll", "ppl")}
    size = {"ratio": plan.ratio, "bytes_per_sequence": plan.bytes_per_sequence}
    timed = metrics.get("decode_seconds")
    return Point(plan=file, name=entry.candidate.name, chosen=chosen, decode_seconds=timed, **size, **losses)


@dataclass(frozen=True)
class SearchResult:
    """Where a finished search is, and what came out.

    `rivals` say what the search was worth. `registered` is the winner in MLflow's registry, None where the tracking
    server was down.
    """

    out: Path
    settings: SearchSettings
    plan: BudgetPlan
    verdict: ValidationResult
    rivals: tuple[Ablation, ...]
    trials: tuple[TrialRecord, ...]
    registered: RegisteredPlan | None

    @property
    def winner(self) -> ValidatedPlan:
        """The candidate that became the plan."""
        return self.verdict.winner

    @property
    def ranking(self) -> tuple[ValidatedPlan, ...]:
        """All candidates, the best first; those of a front by size."""
        return self.verdict.ranking

    @property
    def plan_uri(self) -> str:
        """What jobs/serve.py takes as --plan: the plan in the registry, else the file."""
        return self.registered.uri if self.registered else str(self.out / "plan.json")

    @property
    def next_steps(self) -> dict[str, str]:
        """What to do with the plan: a command for each."""
        model, file = self.settings.model, self.out / "plan.json"
        return {
            "open the UI": "make ui",
            "serve it": f"python jobs/serve.py --plan {self.plan_uri} --model {model}",
            "evaluate it": f"python jobs/evaluate.py --plan {file} --model {model} --texts ifcraft",
        }

    @cached_property
    def param_importances(self) -> dict[str, float]:
        """How much each parameter decided, see `tuning.selection.param_importance`."""
        return param_importances(self.trials, self.settings.goal)

    @property
    def worth(self) -> list[str]:
        """How many times the winner's KL that of each rival is, as sentences."""
        return [f"{rival.name}: {format_ratio(rival.log_kl_ratio)} times the winner's KL on validation" for rival in self.rivals]

    def summary(self) -> dict[str, Any]:
        """The outcome for machines."""
        return {
            "out": str(self.out),
            "plan": str(self.out / "plan.json"),
            "champion": self.registered.uri if self.registered and self.registered.decision.is_champion else None,
            "registered": self.registered.uri if self.registered else None,
            "ratio": self.plan.ratio,
            "bytes_per_sequence": self.plan.bytes_per_sequence,
            "winner": self.winner.candidate.name,
            "validation": [{"name": v.candidate.name, "metrics": v.metrics} for v in self.ranking],
            "front": str(self.out / "front.json") if self.verdict.front else None,
            "rivals": [{"name": r.name, "log_kl_above": _without_nan(asdict(r.above))} for r in self.rivals],
            "importance": self.importance,
            "trials": {status: self.count(status) for status in ("finished", "pruned", "failed")},
        }

    def count(self, status: str) -> int:
        """Trials that ended this way."""
        return sum(record.status == status for record in self.trials)


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: a bound that one document cannot give is null."""
    return {name: None if value != value else value for name, value in values.items()}
