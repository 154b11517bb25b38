"""Choosing the winner: the best trials and the heuristics, scored on windows that no trial was scored on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from baklava.allocation import allocate
from baklava.bootstrap import Interval, interval
from baklava.plan import BudgetPlan
from baklava.progress import say
from tuning.cluster import Crew
from tuning.space import Params, heuristics
from tuning.task import Task
from tuning.trials import LEAST_KL, TrialRecord, best_of, means, objective_of

TOP_TRIALS = 5


@dataclass(frozen=True)
class Candidate:
    """A plan that may win: a trial's, with its parameters and its metrics in the search, or a heuristic's."""

    name: str
    plan: BudgetPlan
    trial: TrialRecord | None = None

    @property
    def params(self) -> Params | None:
        """Parameters of the trial."""
        return self.trial.params if self.trial else None


@dataclass(frozen=True)
class Validated:
    """A candidate with its scores on the validation windows; `metrics` are their means."""

    candidate: Candidate
    windows: tuple[dict[str, Any], ...]
    metrics: dict[str, float]


def candidates(records: Sequence[TrialRecord], task: Task) -> list[Candidate]:
    """The best trials and all heuristics that the budget allows."""
    best = [Candidate(f"trial {r.trial}", task.plan(r.params), r) for r in best_of(records, task.objective, TOP_TRIALS)]
    return best + heuristic_candidates(task)


def heuristic_candidates(task: Task) -> list[Candidate]:
    """One candidate per heuristic; raises UserError when the budget is too small for one."""
    return [
        Candidate(
            name,
            allocate(
                task.profile,
                budget=task.budget,
                context_length=task.context_length,
                method=allocation,
                eviction=eviction,
            ),
        )
        for name, (allocation, eviction) in heuristics().items()
    ]


def validate(crew: Crew, entrants: Sequence[Candidate], windows: Sequence[str], task: Task) -> list[Validated]:
    """All candidates that could be scored, the best first.

    A heuristic that was also a trial is one plan under two names: it is scored once, and the trial goes first.
    """
    plans = {entrant.plan.digest: entrant.plan.model_dump_json() for entrant in entrants}
    tasks = [(plan, window) for plan in plans.values() for window in windows]
    scores = iter(crew.scores(tasks, "validating"))
    by_plan = {digest: tuple(next(scores) for _ in windows) for digest in plans}
    scored = [_validated(entrant, by_plan[entrant.plan.digest]) for entrant in entrants]
    return sorted(filter(None, scored), key=lambda each: objective_of(each.metrics, task.objective))


def above(entry: Validated, winner: Validated) -> Interval:
    """Log of a plan's KL over the winner's, window by window; above 0 the winner is better."""
    pairs = zip(entry.windows, winner.windows, strict=True)
    ratios = [math.log(max(ours["kl"], LEAST_KL) / max(theirs["kl"], LEAST_KL)) for ours, theirs in pairs]
    return interval(ratios, [window["document"] for window in entry.windows])


def _validated(entrant: Candidate, windows: tuple[dict[str, Any], ...]) -> Validated | None:
    error = next((window["error"] for window in windows if "error" in window), None)
    if error:
        say(f"{entrant.name} cannot win, {error}")
        return None
    return Validated(entrant, windows, means(windows))
