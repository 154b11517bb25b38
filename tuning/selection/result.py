"""The result of a search, its front as files, and which parameters decided how good a trial was."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import median_low
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from baklava.console import shell_command
from baklava.evaluation.intervals import nan_to_null
from baklava.plan.budget_plan import BudgetPlan
from baklava.serialization import FrozenModel, atomic_write_text
from tuning.selection.promotion import RegisteredPlan
from tuning.selection.validation import Ablation, ValidatedPlan, ValidationResult, format_ratio
from tuning.study.objective import Goal, subsample
from tuning.study.settings import SearchSettings
from tuning.study.trial import TrialRecord, finished_trials

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
            "serve it": f"{shell_command('baklava-serve')} --plan {self.plan_uri} --model {model}",
            "evaluate it": f"{shell_command('baklava-evaluate')} --plan {file} --model {model} --texts ifcraft",
        }

    @cached_property
    def param_importances(self) -> dict[str, float]:
        """The parameters that decided how good a trial was, see the function of this name."""
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


MIN_TRIALS = 6
"""Finished trials below which there is no result; it takes a few times as many for some certainty."""

MAX_TRIALS = 500
"""Trials that are evaluated, spread evenly over the search: four times as many take half a minute."""

ABSENT = "none"
"""Stands for a choice that a trial did not have."""


def param_importances(records: Sequence[TrialRecord], goal: Goal) -> dict[str, float]:
    """Return the share of the objective's variance that each parameter explains, the largest first; they sum to 1.

    Functional ANOVA (Hutter et al., 2014) by Optuna, on the logarithm of the objective of the sampled trials that
    scored every window. A parameter that only some trials have counts as its median in the others, so that the effect
    of having it is attributed to the choice that it belongs to. Empty if trials are too few, or all the same.
    """
    trials = subsample(comparable_trials(records), MAX_TRIALS)
    columns: dict[str, list[Any]] = {}
    for name in sorted({name for trial in trials for name in trial.params}):
        values = _column(name, trials)
        if len(set(values)) > 1:
            columns[name] = values
    objectives = [goal.objective_value(trial.metrics) for trial in trials]
    if len(trials) < MIN_TRIALS or not columns or len(set(objectives)) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = _study(columns, objectives)
        shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return {name: float(value) for name, value in shares.items() if math.isfinite(value)}


def comparable_trials(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the finished trials without refinements, which differ from their base in no named parameter."""
    return [record for record in finished_trials(records) if not record.parent_trial]


def is_numeric(name: str, trials: Sequence[TrialRecord]) -> bool:
    """Return whether a parameter is a number that was sampled from a range."""
    return all(isinstance(trial.params[name], float) for trial in trials if name in trial.params)


def _column(name: str, trials: Sequence[TrialRecord]) -> list[Any]:
    """The parameter's value in every trial, and a stand-in where a trial does not have it."""
    absent = ABSENT
    if is_numeric(name, trials):
        absent = median_low(trial.params[name] for trial in trials if name in trial.params)
    return [trial.params.get(name, absent) for trial in trials]


def _study(columns: dict[str, list[Any]], objectives: Sequence[float]) -> optuna.study.Study:
    study = optuna.create_study()
    distributions = {name: _distribution(column) for name, column in columns.items()}
    for number, objective in enumerate(objectives):
        params = {name: column[number] for name, column in columns.items()}
        value = math.log(max(objective, 1e-12))
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    return study


def _distribution(column: Sequence[Any]) -> BaseDistribution:
    """What a parameter was sampled from, as far as the trials show."""
    if all(isinstance(value, float) for value in column):
        return FloatDistribution(min(column), max(column))
    return CategoricalDistribution(sorted(set(column), key=str))
