"""What the search was worth: the winner against greedy, and against its own budgets shuffled over the heads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from baklava.allocation import Greedy, shuffled
from baklava.evaluation.intervals import Interval, format_interval
from tuning.selection.validation import Candidate, ValidatedPlan, ValidationResult, log_kl_ratio, validate
from tuning.study.search_space import SearchTask
from tuning.workers.cluster import WorkerGroup

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
