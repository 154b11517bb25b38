"""What a search hands over when it is done."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baklava.plan import BudgetPlan
from tuning.settings import SearchSettings
from tuning.trials import TrialRecord
from tuning.validate import Validated


@dataclass(frozen=True)
class Outcome:
    """Where a finished search is, and what came out. `ranking` has the best plan first.

    `champion` is the `models:/` URI of the winner, None where the tracking server was down.
    """

    out: Path
    settings: SearchSettings
    plan: BudgetPlan
    ranking: tuple[Validated, ...]
    trials: tuple[TrialRecord, ...]
    champion: str | None

    @property
    def winner(self) -> Validated:
        """The candidate that became the plan."""
        return self.ranking[0]

    @property
    def served_by(self) -> str:
        """What jobs/serve.py takes as --plan: the champion, else the file."""
        return self.champion or str(self.out / "plan.json")

    @property
    def next_steps(self) -> dict[str, str]:
        """What to do with the plan: a command for each."""
        model, file = self.settings.model, self.out / "plan.json"
        return {
            "open the UI": "make ui",
            "serve it": f"python jobs/serve.py --plan {self.served_by} --model {model}",
            "evaluate it": f"python jobs/evaluate.py --plan {file} --model {model} --texts ifcraft",
        }

    def summary(self) -> dict[str, Any]:
        """The outcome for machines."""
        return {
            "out": str(self.out),
            "plan": str(self.out / "plan.json"),
            "champion": self.champion,
            "ratio": self.plan.ratio,
            "bytes_per_sequence": self.plan.bytes_per_sequence,
            "winner": self.winner.candidate.name,
            "validation": [{"name": v.candidate.name, "metrics": v.metrics} for v in self.ranking],
            "trials": {status: self.count(status) for status in ("finished", "pruned", "failed")},
        }

    def count(self, status: str) -> int:
        """Trials that ended this way."""
        return sum(record.status == status for record in self.trials)
