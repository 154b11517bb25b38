"""Choosing the winner on windows that no trial was scored on, and what the search was worth there.

The best trials and the baselines are validated. Then the winner is compared with greedy, and with its own budgets
shuffled over the heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from baklava.allocation import Greedy, shuffled
from baklava.console import log
from baklava.errors import UserError
from baklava.evaluation.intervals import Interval, bootstrap_mean, format_interval
from baklava.plan.budget_plan import BudgetPlan
from tuning.optimizers.baselines import baseline_methods
from tuning.study.objective import Goal, knee, nearest, non_dominated, subsample
from tuning.study.search_space import SearchTask
from tuning.study.trial import (
    MIN_KL,
    TrialRecord,
    best_trials,
    finished_trials,
    mean_metrics,
    non_finite_reason,
)
from tuning.workers.cluster import WorkerGroup

NUM_TOP_TRIALS = 3
"""Sampled trials, and as many refined ones, that are validated.

Twice as many sampled ones if none is refined, and twice as many of both if sizes differ.
"""

FEASIBILITY_SLACK = 1.5
"""Loss on search windows, over the bound, up to which a trial may still be feasible on validation windows."""


class InfeasibleError(UserError):
    """No plan stays within the bound, or none can be scored: the search is over, and resuming it changes nothing."""


@dataclass(frozen=True)
class Candidate:
    """A plan that may win; `trial` is the trial it comes from, None for a baseline."""

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
    """The winner, all scored candidates with the best first, and the front if the goal is one."""

    winner: ValidatedPlan
    ranking: tuple[ValidatedPlan, ...]
    front: tuple[ValidatedPlan, ...] = ()


def select_winner(
    group: WorkerGroup, records: Sequence[TrialRecord], windows: Sequence[str], task: SearchTask
) -> ValidationResult | None:
    """Score the candidates and choose; return None if no plan could be scored.

    Baselines need a size: if the trials sampled theirs, the baselines get the winner's. With `max_dnll`, they then only
    show what the winner is worth, since a few bytes less would be a matter of rounding.

    Raises:
        InfeasibleError: no plan stays within the bound.
    """
    goal = task.goal
    candidates = trial_candidates(records, task)
    if goal.budget is not None and not goal.samples_budget:
        candidates += baseline_candidates(task, goal.budget)
    scored = validate(group, candidates, windows, task)
    if not scored or not goal.samples_budget:
        return rank_plans(scored, goal) if scored else None
    winner = choose_winner(scored, goal)
    scored += validate(group, baseline_candidates(task, byte_ratio(winner)), windows, task)
    return rank_plans(scored, goal, None if goal.front else winner)


def rank_plans(scored: Sequence[ValidatedPlan], goal: Goal, winner: ValidatedPlan | None = None) -> ValidationResult:
    """Rank scored plans and choose the winner unless it is given; raise InfeasibleError if none is feasible."""
    winner = winner or choose_winner(scored, goal)
    if goal.front:
        # Losses of different sizes do not compare, so they are ordered by size.
        return ValidationResult(winner, tuple(sorted(scored, key=byte_ratio)), tuple(pareto_front(scored, goal)))
    return ValidationResult(winner, tuple(sorted(scored, key=lambda plan: goal.objective_value(plan.metrics))))


def choose_winner(scored: Sequence[ValidatedPlan], goal: Goal) -> ValidatedPlan:
    """Return the plan that the goal is for; raise InfeasibleError if none is feasible."""
    if goal.front:

        def size_and_loss(plan: ValidatedPlan) -> tuple[float, float]:
            return byte_ratio(plan), goal.loss(plan.metrics)

        front = non_dominated(pareto_front(scored, goal), size_and_loss)
        return nearest(front, byte_ratio, goal.budget) if goal.budget else knee(front, size_and_loss)
    best = min(scored, key=lambda plan: goal.objective_value(plan.metrics))
    if not goal.is_feasible(best.metrics):
        raise InfeasibleError(
            f"no plan stays within --max-dnll {goal.max_dnll:g} on the validation windows; the nearest is "
            f"{best.candidate.name} with {goal.format_metrics(best.metrics)}; start a new search with a larger "
            "--max-dnll, or with more --trials"
        )
    return best


def pareto_front(scored: Sequence[ValidatedPlan], goal: Goal) -> list[ValidatedPlan]:
    """Return the plans that no other one beats in all numbers of a front, the smallest first."""
    return non_dominated(scored, lambda plan: goal.pareto_values(plan.metrics))


def byte_ratio(plan: ValidatedPlan) -> float:
    """Return the plan's share of the full cache's bytes."""
    return plan.metrics["ratio"]


def trial_candidates(records: Sequence[TrialRecord], task: SearchTask) -> list[Candidate]:
    """Return the best sampled trials and the best refined ones."""
    sampled = [record for record in records if not record.parent_trial]
    refined = [record for record in records if record.parent_trial]
    count = NUM_TOP_TRIALS * (2 if task.goal.samples_budget else 1) * (1 if refined else 2)
    candidates = []
    for record in (*top_trials(sampled, task.goal, count), *top_trials(refined, task.goal, count)):
        origin = f", refined from {record.parent_trial}" if record.parent_trial else ""
        candidates.append(Candidate(f"trial {record.trial}{origin}", task.plan(record.params), record))
    return candidates


def top_trials(records: Sequence[TrialRecord], goal: Goal, count: int) -> list[TrialRecord]:
    """Return the best trials that scored every window; if sizes differ, those nearest to what the goal is for."""
    if not goal.samples_budget:
        return best_trials(records, goal, count)
    front = non_dominated(finished_trials(records), lambda record: goal.pareto_values(record.metrics))
    if goal.max_dnll is None:
        return subsample(front, count)
    # A plan just above the bound may be within it on other windows, and the other way round: take the nearest.
    feasible = [record for record in front if goal.is_feasible(record.metrics)]
    nearly = [record for record in front if goal.max_dnll < record.metrics["dnll"] <= FEASIBILITY_SLACK * goal.max_dnll]
    nearly = nearly[-max(count // 2, count - len(feasible)) :]
    return [*nearly, *feasible[: count - len(nearly)]] or front[-1:]


def baseline_candidates(task: SearchTask, budget: float) -> list[Candidate]:
    """Return one candidate per baseline that fits into the budget."""
    candidates = []
    for method in baseline_methods(task.space):
        try:
            plan = method.plan(task.profile, budget, task.context_length, task.prefill)
            candidates.append(Candidate(method.name, plan))
        except UserError as error:
            log(f"{method.name} cannot win, {error}")
    return candidates


def validate(
    group: WorkerGroup, candidates: Sequence[Candidate], windows: Sequence[str], task: SearchTask
) -> list[ValidatedPlan]:
    """Score candidates and return those that could be scored, the best first.

    A baseline that was also a trial is one plan with two names: it is scored once, and the trial goes first.
    """
    plans = {candidate.plan.digest: candidate.plan.model_dump_json() for candidate in candidates}
    scores = iter(group.scores([(plan, window) for plan in plans.values() for window in windows], "validating"))
    by_digest = {digest: tuple(next(scores) for _ in windows) for digest in plans}
    validated = []
    for candidate in candidates:
        plan, window_scores = candidate.plan, by_digest[candidate.plan.digest]
        reasons = [score.get("error") or non_finite_reason(score) for score in window_scores]
        if error := next(filter(None, reasons), None):
            log(f"{candidate.name} cannot win, {error}")
            continue
        size = {"ratio": plan.ratio, "bytes_per_sequence": float(plan.bytes_per_sequence)}
        validated.append(ValidatedPlan(candidate, window_scores, {**mean_metrics(window_scores), **size}))
    return sorted(validated, key=lambda entry: task.goal.objective_value(entry.metrics))


def log_kl_ratio(plans: Sequence[ValidatedPlan], winner: ValidatedPlan) -> Interval:
    """Return the mean log of plans' KL over the winner's, window by window; above 0 the winner is better."""
    pairs = [pair for plan in plans for pair in zip(plan.windows, winner.windows, strict=True)]
    ratios = [math.log(max(score["kl"], MIN_KL) / max(best["kl"], MIN_KL)) for score, best in pairs]
    return bootstrap_mean(ratios, [score["document"] for score, _ in pairs])


NUM_SHUFFLES = 3
"""Random permutations of the winner's budgets over its heads."""


@dataclass(frozen=True)
class Ablation:
    """Plans that need no search, and the logarithm of their KL over the winner's on the same windows.

    The winner was chosen on those windows, which flatters it by some hundredths if several plans are equally good.
    """

    name: str
    log_kl_ratio: Interval


def run_ablations(
    group: WorkerGroup, validation: ValidationResult, windows: Sequence[str], task: SearchTask
) -> tuple[Ablation, ...]:
    """Compare the winner with the best greedy baseline, unless that won, and with permutations of its budgets."""
    winner = validation.winner
    others = [entry for entry in validation.ranking if entry.candidate.trial is None and entry is not winner]
    greedy = [entry for entry in others if entry.candidate.plan.allocation.method == Greedy.name]
    greedy = sorted(greedy, key=lambda entry: task.goal.loss(entry.metrics))[:1]
    shuffled = validate(group, shuffled_candidates(winner), windows, task)
    compared = [
        *((entry.candidate.name, [entry]) for entry in greedy),
        (f"its own budgets, shuffled over the heads {len(shuffled)} times", shuffled),
    ]
    return tuple(Ablation(name, log_kl_ratio(entries, winner)) for name, entries in compared if entries)


def format_ratio(log_ratio: Interval) -> str:
    """Return the ratio whose logarithm this is, with its interval."""
    mean, low, high = (math.exp(value) for value in (log_ratio.mean, log_ratio.low, log_ratio.high))
    return format_interval(replace(log_ratio, mean=mean, low=low, high=high), ".2f")


def shuffled_candidates(winner: ValidatedPlan) -> list[Candidate]:
    """Return plans with the winner's budgets in other heads."""
    plan = winner.candidate.plan
    return [Candidate(f"shuffled {seed}", shuffled(plan, seed)) for seed in range(NUM_SHUFFLES)]
