"""Choosing the winner: the best trials and the heuristics, scored on windows that no trial was scored on."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from baklava.console import log
from baklava.errors import UserError
from baklava.evaluation.bootstrap import Interval, interval
from baklava.plan.budget_plan import BudgetPlan
from tuning.optimizers.baselines import heuristics
from tuning.optimizers.pareto import knee, nearest, non_dominated, thinned
from tuning.study.objective import Goal
from tuning.study.search_space import Task
from tuning.study.trial import LEAST_KL, TrialRecord, best_of, finished, means, not_finite
from tuning.workers.cluster import Crew

TOP_TRIALS = 3
"""Trials as drawn, and as many refined ones, that meet on validation windows; twice as many drawn ones where none are
refined, and twice as many of both where sizes differ."""

HOPEFUL = 1.5
"""Loss on search windows, over the bound, up to which a trial may still keep the bound on validation windows."""


class UnkeptError(UserError):
    """No plan keeps the bound, or none can be scored: the search is over, and going on with it would change nothing."""


@dataclass(frozen=True)
class Candidate:
    """A plan that may win: a trial's, with its parameters and its metrics in the search, or a heuristic's."""

    name: str
    plan: BudgetPlan
    trial: TrialRecord | None = None


@dataclass(frozen=True)
class Validated:
    """A candidate with its scores on the validation windows; `metrics` are their means and the plan's size."""

    candidate: Candidate
    windows: tuple[dict[str, Any], ...]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """What validation says: who won, all who were scored, the best first, and the front where one was asked for."""

    winner: Validated
    ranking: tuple[Validated, ...]
    front: tuple[Validated, ...] = ()


def decide(crew: Crew, records: Sequence[TrialRecord], windows: Sequence[str], task: Task) -> Verdict | None:
    """Score the candidates and choose; None where no plan could be scored.

    Heuristics need a size: where the trials chose theirs, the heuristics get the winner's. Under a bound they then only
    show what it is worth, since a few bytes less would be a matter of rounding.

    Raises:
        UserError: no plan keeps the bound.
    """
    entrants, goal = candidates(records, task), task.goal
    if goal.budget is not None and not goal.draws_budget:
        entrants += heuristic_candidates(task, goal.budget)
    scored = validate(crew, entrants, windows, task)
    if not scored or not goal.draws_budget:
        return verdict(scored, goal) if scored else None
    winner = chosen(scored, goal)
    scored += validate(crew, heuristic_candidates(task, winner.candidate.plan.ratio), windows, task)
    return verdict(scored, goal, None if goal.front else winner)


def verdict(scored: Sequence[Validated], goal: Goal, winner: Validated | None = None) -> Verdict:
    """The verdict on plans that were scored, of which `winner` won if given; UserError where none keeps the bound."""
    winner = winner or chosen(scored, goal)
    if goal.front:
        # Losses of different sizes do not compare, so they stand by size.
        return Verdict(winner, tuple(sorted(scored, key=size_of)), tuple(front_of(scored, goal)))
    return Verdict(winner, tuple(sorted(scored, key=lambda each: goal.value(each.metrics))))


def chosen(scored: Sequence[Validated], goal: Goal) -> Validated:
    """The plan that the goal asks for; raises UserError where none keeps the bound."""
    if goal.front:
        front = non_dominated(front_of(scored, goal), _size_and_loss(goal))
        return nearest(front, size_of, goal.budget) if goal.budget else knee(front, _size_and_loss(goal))
    best = min(scored, key=lambda each: goal.value(each.metrics))
    if not goal.keeps(best.metrics):
        raise UnkeptError(
            f"--max-dnll {goal.max_dnll:g} is not kept by any plan on the validation windows, the nearest is "
            f"{best.candidate.name} with {goal.told(best.metrics)}; start a new search that allows more, or with more "
            "--trials"
        )
    return best


def front_of(scored: Sequence[Validated], goal: Goal) -> list[Validated]:
    """The plans that no other one beats in bytes and loss, and latency if that counts, the smallest first."""
    return non_dominated(scored, lambda entry: goal.axes(entry.metrics))


def size_of(entry: Validated) -> float:
    """Share of the full cache's bytes."""
    return entry.metrics["ratio"]


def candidates(records: Sequence[TrialRecord], task: Task) -> list[Candidate]:
    """The best trials as drawn and the best refined ones."""
    drawn, refined = ([r for r in records if bool(r.refines) is refines] for refines in (False, True))
    count = TOP_TRIALS * (2 if task.goal.draws_budget else 1) * (1 if refined else 2)
    best = [*leaders(drawn, task.goal, count), *leaders(refined, task.goal, count)]
    return [Candidate(_name(record), task.plan(record.params), record) for record in best]


def leaders(records: Sequence[TrialRecord], goal: Goal, count: int) -> list[TrialRecord]:
    """The best trials that scored every window; of several sizes, those nearest to what the goal asks for."""
    if not goal.draws_budget:
        return best_of(records, goal, count)
    whole = finished(records)
    front = non_dominated(whole, lambda record: goal.axes(record.metrics))
    if goal.max_dnll is None:
        return thinned(front, count)
    # What just failed the bound may keep it elsewhere, and the other way round: those nearest to it, from both sides.
    keeping = [record for record in front if goal.keeps(record.metrics)]
    failing = [record for record in front if goal.max_dnll < record.metrics["dnll"] <= HOPEFUL * goal.max_dnll]
    failing = failing[-max(count // 2, count - len(keeping)) :]
    return [*failing, *keeping[: count - len(failing)]] or front[-1:]


def heuristic_candidates(task: Task, budget: float) -> list[Candidate]:
    """One candidate per heuristic that fits into the budget."""
    fitting = []
    for each in heuristics(task.space):
        try:
            fitting.append(Candidate(each.name, each.plan(task.profile, budget, task.context_length)))
        except UserError as error:
            log(f"{each.name} cannot win, {error}")
    return fitting


def validate(crew: Crew, entrants: Sequence[Candidate], windows: Sequence[str], task: Task) -> list[Validated]:
    """All candidates that could be scored, the best first.

    A heuristic that was also a trial is one plan under two names: it is scored once, and the trial goes first.
    """
    plans = {entrant.plan.digest: entrant.plan.model_dump_json() for entrant in entrants}
    tasks = [(plan, window) for plan in plans.values() for window in windows]
    scores = iter(crew.scores(tasks, "validating"))
    by_plan = {digest: tuple(next(scores) for _ in windows) for digest in plans}
    scored = [_validated(entrant, by_plan[entrant.plan.digest]) for entrant in entrants]
    return sorted(filter(None, scored), key=lambda each: task.goal.value(each.metrics))


def above(entries: Sequence[Validated], winner: Validated) -> Interval:
    """Log of plans' KL over the winner's, window by window; above 0 the winner is better than they are on average."""
    pairs = [pair for entry in entries for pair in zip(entry.windows, winner.windows, strict=True)]
    ratios = [math.log(max(ours["kl"], LEAST_KL) / max(theirs["kl"], LEAST_KL)) for ours, theirs in pairs]
    return interval(ratios, [ours["document"] for ours, _ in pairs])


def _size_and_loss(goal: Goal) -> Callable[[Validated], tuple[float, float]]:
    return lambda entry: (size_of(entry), goal.loss(entry.metrics))


def _name(record: TrialRecord) -> str:
    return f"trial {record.trial}" + (f", refined from {record.refines}" if record.refines else "")


def _validated(entrant: Candidate, windows: tuple[dict[str, Any], ...]) -> Validated | None:
    error = next((reason for window in windows if (reason := window.get("error") or not_finite(window))), None)
    if error:
        log(f"{entrant.name} cannot win, {error}")
        return None
    plan = entrant.plan
    size = {"ratio": plan.ratio, "bytes_per_sequence": float(plan.bytes_per_sequence)}
    return Validated(entrant, windows, {**means(windows), **size})
