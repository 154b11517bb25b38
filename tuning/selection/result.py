"""The result of a search, and the front as files."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from baklava.evaluation.intervals import nan_to_null
from baklava.plan.budget_plan import BudgetPlan
from baklava.serialization import FrozenModel, atomic_write_text
from tuning.selection.param_importance import param_importances
from tuning.selection.promotion import RegisteredPlan
from tuning.selection.validation import Ablation, ValidatedPlan, ValidationResult, format_ratio
from tuning.study.settings import SearchSettings
from tuning.study.trial import TrialRecord

FRONT_FILE, FRONT_FOLDER = "front.json", "front"


class FrontPoint(FrozenModel):
    """A plan that no other one beats in bytes, loss, and (with `--latency`) seconds per decode step.

    The losses are means on the validation windows. `plan` is its file, relative to the folder of the search; `chosen`
    marks the one that became plan.json.
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

    points: tuple[FrontPoint, ...]


def write_front(
    out: Path, entries: Sequence[ValidatedPlan], plans: Sequence[BudgetPlan], winner: ValidatedPlan
) -> None:
    """Write a plan file per point, then the list of them."""
    folder = out / FRONT_FOLDER
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("plan-*.json"):
        stale.unlink()
    points = []
    for number, (entry, plan) in enumerate(zip(entries, plans, strict=True), start=1):
        name = f"{FRONT_FOLDER}/plan-{number:02}.json"
        plan.write(out / name)
        points.append(
            FrontPoint(
                plan=name,
                name=entry.candidate.name,
                ratio=entry.candidate.plan.ratio,
                bytes_per_sequence=entry.candidate.plan.bytes_per_sequence,
                **{loss: entry.metrics[loss] for loss in ("kl", "kl_geometric", "dnll", "ppl")},
                decode_seconds=entry.metrics.get("decode_seconds"),
                chosen=entry is winner,
            )
        )
    atomic_write_text(out / FRONT_FILE, Front(points=tuple(points)).model_dump_json(indent=1) + "\n")


@dataclass(frozen=True)
class SearchResult:
    """Where a finished search is, and what came out.

    `registered` is the winner in MLflow's registry, None if the tracking server was down.
    """

    out: Path
    settings: SearchSettings
    plan: BudgetPlan
    validation: ValidationResult
    ablations: tuple[Ablation, ...]
    trials: tuple[TrialRecord, ...]
    registered: RegisteredPlan | None

    @property
    def winner(self) -> ValidatedPlan:
        """The candidate that became the plan."""
        return self.validation.winner

    @property
    def ranking(self) -> tuple[ValidatedPlan, ...]:
        """All candidates, the best first; those of a front by size."""
        return self.validation.ranking

    @property
    def plan_uri(self) -> str:
        """What baklava-serve takes as --plan: the plan in the registry, else the file."""
        return self.registered.uri if self.registered else str(self.out / "plan.json")

    @property
    def next_steps(self) -> dict[str, str]:
        """What to do with the plan: a command for each."""
        model, file = self.settings.model, self.out / "plan.json"
        return {
            "open the UI": "make ui",
            "serve it": f"baklava-serve --plan {self.plan_uri} --model {model}",
            "evaluate it": f"baklava-evaluate --plan {file} --model {model} --texts ifcraft",
        }

    @cached_property
    def param_importances(self) -> dict[str, float]:
        """The parameters that decided how good a trial was, see `tuning.selection.param_importance`."""
        return param_importances(self.trials, self.settings.goal)

    @property
    def ablation_summary(self) -> list[str]:
        """The KL of each ablation over the winner's, as sentences."""
        return [f"{a.name}: {format_ratio(a.log_kl_ratio)} times the winner's KL on validation" for a in self.ablations]

    def summary(self) -> dict[str, Any]:
        """Return the result for machines."""
        registered = self.registered
        ablations = []
        for ablation in self.ablations:
            ablations.append({"name": ablation.name, "log_kl_above": nan_to_null(asdict(ablation.log_kl_ratio))})
        return {
            "out": str(self.out),
            "plan": str(self.out / "plan.json"),
            "champion": registered.uri if registered and registered.decision.is_champion else None,
            "registered": registered.uri if registered else None,
            "ratio": self.plan.ratio,
            "bytes_per_sequence": self.plan.bytes_per_sequence,
            "winner": self.winner.candidate.name,
            "validation": [{"name": v.candidate.name, "metrics": v.metrics} for v in self.ranking],
            "front": str(self.out / FRONT_FILE) if self.validation.front else None,
            "rivals": ablations,
            "importance": self.param_importances,
            "trials": {status: self.count(status) for status in ("finished", "pruned", "failed")},
        }

    def count(self, status: str) -> int:
        """Return the number of trials that ended with this status."""
        return sum(record.status == status for record in self.trials)
