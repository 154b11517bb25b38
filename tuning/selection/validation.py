"""Choosing the winner: the best trials and the heuristics, scored on windows that no trial was scored on."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from baklava.console import log
from baklava.errors import UserError
from baklava.evaluation.bootstrap import Interval, interval
from baklava.plan.budget_plan import BudgetPlan
from tuning.optimizers.baselines import baseline_methods
from tuning.optimizers.pareto import knee, nearest, non_dominated, subsample
from tuning.study.objective import Goal
from tuning.study.search_space import SearchTask
from tuning.study.trial import MIN_KL, TrialRecord, best_trials, finished_trials, mean_metrics, non_finite_reason
from tuning.workers.cluster import WorkerGroup

NUM_TOP_TRIALS = 3
"""Trials as drawn, and as many refined ones, that meet on validation windows; twice as many drawn ones where none are
refined, and twice as many of both where sizes differ."""

FEASIBILITY_SLACK = 1.5
"""Loss on search windows, over the bound, up to which a trial may still keep the bound on validation windows."""


class InfeasibleError(UserError):
    """No plan keeps the bound, or none can be scored: the search is over, and going on with it would change nothing."""


@dataclass(frozen=True)
class Candidate:
    """A plan that may win: a trial's, with its parameters and its metrics in the search, or a heuristic's."""

    name: str
    plan: BudgetPlan
    trial: TrialRecord | None = None


@dataclass(frozen=True)
class ValidatedPlan:
    """A candidate with its scores on the validation windows; `metrics` are their means and the plan's size."""

    candidate: Candidate
    windows: tuple[dict[str, Any], ...]
    metrics: dict[str, float]


@dataclass(frozen=True)
class ValidationResult:
    """What validation says: who won, all who were scored, the best first, and the front where one was asked for."""

    winner: ValidatedPlan
    ranking: tuple[ValidatedPlan, ...]
    front: tuple[ValidatedPlan, ...] = ()


def select_winner(crew: WorkerGroup, records: Sequence[TrialRecord], windows: Sequence[str], task: SearchTask) -> ValidationResult | None:
    """Score the candidates and choose; None where no plan could be scored.

    Heuristics need a size: where the trials chose theirs, the heuristics get the winner's. Under a bound they then only
    show what it is worth, since a few bytes less would be a matter of rounding.

    Raises:
        UserError: no plan keeps the bound.
    """
    entrants, goal = trial_candidates(records, task), task.goal
    if goal.budget is not None and not goal.samples_budget:
        entrants += baseline_candidates(task, goal.budget)
    scored = validate(crew, entrants, windows, task)
    if not scored or not goal.samples_budget:
        return rank_plans(scored, goal) if scored else None
    winner = chosen(scored, goal)
    scored += validate(crew, baseline_candidates(task, winner.candidate.plan.ratio), windows, task)
    return rank_plans(scored, goal, None if goal.front else winner)


def rank_plans(scored: Sequence[ValidatedPlan], goal: Goal, winner: ValidatedPlan | None = None) -> ValidationResult:
    """The verdict on plans that were scored, of which `winner` won if given; UserError where none keeps the bound."""
    winner = winner or chosen(scored, goal)
    if goal.front:
        # Losses of different sizes do not compare, so they stand by size.
        return ValidationResult(winner, tuple(sorted(scored, key=byte_ratio)), tuple(pareto_front(scored, goal)))
    return ValidationResult(winner, tuple(sorted(scored, key=lambda each: goal.objective_value(each.metrics))))


def chosen(scored: Sequence[ValidatedPlan], goal: Goal) -> ValidatedPlan:
    """The plan that the goal asks for; raises UserError where none keeps the bound."""
    if goal.front:
        front = non_dominated(pareto_front(scored, goal), _size_and_loss(goal))
        return nearest(front, size_of, goal.budget) if goal.budget else knee(front, _size_and_loss(goal))
    best = min(scored, key=lambda each: goal.objective_value(each.metrics))
    if not goal.is_feasible(best.metrics):
        raise InfeasibleError(
            f"--max-dnll {goal.max_dnll:g} is not kept by any plan on the validation windows, the nearest is "
            f"{best.candidate.name} with {goal.format_metrics(best.metrics)}; start a new search that allows more, or with more "
            "--trials"
        )
    return best


def pareto_front(scored: Sequence[ValidatedPlan], goal: Goal) -> list[ValidatedPlan]:
    """The plans that no other one beats in bytes and loss, and latency if that counts, the smallest first."""
    return non_dominated(scored, lambda entry: goal.pareto_values(entry.metrics))


def byte_ratio(entry: ValidatedPlan) -> float:
    """Share of the full cache's bytes."""
    return entry.metrics["ratio"]


def trial_candidates(records: Sequence[TrialRecord], task: SearchTask) -> list[Candidate]:
    """The best trials as drawn and the best refined ones."""
    drawn, refined = ([r for r in records if bool(r.parent_trial) is refines] for refines in (False, True))
    count = NUM_TOP_TRIALS * (2 if task.goal.samples_budget else 1) * (1 if refined else 2)
    best = [*top_trials(drawn, task.goal, count), *top_trials(refined, task.goal, count)]
    return [Candidate(_name(record), task.plan(record.params), record) for record in best]


def top_trials(records: Sequence[TrialRecord], goal: Goal, count: int) -> list[TrialRecord]:
    """The best trials that scored every window; of several sizes, those nearest to what the goal asks for."""
    if not goal.samples_budget:
        return best_trials(records, goal, count)
    whole = finished_trials(records)
    front = non_dominated(whole, lambda record: goal.pareto_values(record.metrics))
    if goal.max_dnll is None:
        return subsample(front, count)
    # What just failed the bound may keep it elsewhere, and the other way round: those nearest to it, from both sides.
    keeping = [record for record in front if goal.is_feasible(record.metrics)]
    failing = [record for record in front if goal.max_dnll < record.metrics["dnll"] <= FEASIBILITY_SLACK * goal.max_dnll]
    failing = failing[-max(count // 2, count - len(keeping)) :]
    return [*failing, *keeping[: count - len(failing)]] or front[-1:]


def baseline_candidates(task: SearchTask, budget: float) -> list[Candidate]:
    """One candidate per heuristic that fits into the budget."""
    fitting = []
    for each in baseline_methods(task.space):
        try:
            fitting.append(Candidate(each.name, each.plan(task.profile, budget, task.context_length)))
        except UserError as error:
            log(f"{each.name} cannot win, {error}")
    return fitting


def validate(crew: WorkerGroup, entrants: Sequence[Candidate], windows: Sequence[str], task: SearchTask) -> list[ValidatedPlan]:
    """All candidates that could be scored, the best first.

    A heuristic that was also a trial is one plan under two names: it is scored once, and the trial goes first.
    """
    plans = {entrant.plan.digest: entrant.plan.model_dump_json() for entrant in entrants}
    tasks = [(plan, window) for plan in plans.values() for window in windows]
    scores = iter(crew.scores(tasks, "validating"))
    by_plan = {digest: tuple(next(scores) for _ in windows) for digest in plans}
    scored = [_validated(entrant, by_plan[entrant.plan.digest]) for entrant in entrants]
    return sorted(filter(None, scored), key=lambda each: task.goal.objective_value(each.metrics))


def log_kl_ratio(entries: Sequence[ValidatedPlan], winner: ValidatedPlan) -> Interval:
    """Log of plans' KL over the winner's, window by window; above 0 the winner is better than they are on average."""
    pairs = [pair for entry in entries for pair in zip(entry.windows, winner.windows, strict=True)]
    ratios = [math.log(max(ours["kl"], MIN_KL) / max(theirs["kl"], MIN_KL)) for ours, theirs in pairs]
    return interval(ratios, [ours["document"] for ours, _ in pairs])


def _size_and_loss(goal: Goal) -> Callable[[ValidatedPlan], tuple[float, float]]:
    return lambda entry: (byte_ratio(entry), goal.loss(entry.metrics))


def _name(record: TrialRecord) -> str:
    return f"trial {record.trial}" + (f", refined from {record.parent_trial}" if record.parent_trial else "")


def _validated(entrant: Candidate, windows: tuple[dict[str, Any], ...]) -> ValidatedPlan | None:
    error = next((reason for window in windows if (reason := window.get("error") or non_finite_reason(window))), None)
    if error:
        log(f"{entrant.name} cannot win, {error}")
        return None
    plan = entrant.plan
    size = {"ratio": plan.ratio, "bytes_per_sequence": float(plan.bytes_per_sequence)}
    return ValidatedPlan(entrant, windows, {**mean_metrics(windows), **size})
