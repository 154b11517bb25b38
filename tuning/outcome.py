"""What a search hands over when it is done."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from baklava.plan import BudgetPlan
from tuning.champion import Registered
from tuning.importance import importance
from tuning.settings import SearchSettings
from tuning.trials import TrialRecord
from tuning.validate import Validated, Verdict
from tuning.worth import Rival, told


@dataclass(frozen=True)
class Outcome:
    """Where a finished search is, and what came out.

    `rivals` say what the search was worth. `registered` is the winner in MLflow's registry, None where the tracking
    server was down.
    """

    out: Path
    settings: SearchSettings
    plan: BudgetPlan
    verdict: Verdict
    rivals: tuple[Rival, ...]
    trials: tuple[TrialRecord, ...]
    registered: Registered | None

    @property
    def winner(self) -> Validated:
        """The candidate that became the plan."""
        return self.verdict.winner

    @property
    def ranking(self) -> tuple[Validated, ...]:
        """All candidates, the best first; those of a front by size."""
        return self.verdict.ranking

    @property
    def served_by(self) -> str:
        """What jobs/serve.py takes as --plan: the plan in the registry, else the file."""
        return self.registered.uri if self.registered else str(self.out / "plan.json")

    @property
    def next_steps(self) -> dict[str, str]:
        """What to do with the plan: a command for each."""
        model, file = self.settings.model, self.out / "plan.json"
        return {
            "open the UI": "make ui",
            "serve it": f"python jobs/serve.py --plan {self.served_by} --model {model}",
            "evaluate it": f"python jobs/evaluate.py --plan {file} --model {model} --texts ifcraft",
        }

    @cached_property
    def importance(self) -> dict[str, float]:
        """How much each parameter decided, see `tuning.importance`."""
        return importance(self.trials, self.settings.goal)

    @property
    def worth(self) -> list[str]:
        """How many times the winner's KL that of each rival is, as sentences."""
        return [f"{rival.name}: {told(rival.above)} times the winner's KL on validation" for rival in self.rivals]

    def summary(self) -> dict[str, Any]:
        """The outcome for machines."""
        return {
            "out": str(self.out),
            "plan": str(self.out / "plan.json"),
            "champion": self.registered.uri if self.registered and self.registered.claim.holds else None,
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
