"""What the search was worth: the winner against greedy, and against its own budgets dealt out at random."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from baklava.allocation import Greedy, permuted
from baklava.evaluation.bootstrap import Interval
from baklava.evaluation.formatting import with_bounds
from tuning.selection.validation import Candidate, ValidatedPlan, ValidationResult, log_kl_ratio, validate
from tuning.study.search_space import SearchTask
from tuning.workers.cluster import WorkerGroup

NUM_SHUFFLES = 3
"""Random permutations of the winner's budgets over its heads."""


@dataclass(frozen=True)
class Ablation:
    """Plans that cost no search, and the logarithm of their KL over the winner's on the same windows.

    The winner was chosen on those windows, which flatters it by some hundredths where several plans are as good.
    """

    name: str
    above: Interval


def run_ablations(crew: WorkerGroup, verdict: ValidationResult, windows: Sequence[str], task: SearchTask) -> tuple[Ablation, ...]:
    """The best greedy heuristic, unless it won, and permutations of the winner's budgets."""
    winner = verdict.winner
    dealt = validate(crew, shuffled_candidates(winner), windows, task)
    groups = [
        *((entry.candidate.name, [entry]) for entry in _greedy(verdict, task)),
        (f"its own budgets, dealt out at random {len(dealt)} times", dealt),
    ]
    return tuple(Ablation(name, log_kl_ratio(entries, winner)) for name, entries in groups if entries)


def format_ratio(above: Interval) -> str:
    """The ratio whose logarithm this is, with its interval."""
    mean, low, high = (math.exp(value) for value in (above.mean, above.low, above.high))
    return with_bounds(replace(above, mean=mean, low=low, high=high), ".2f")


def shuffled_candidates(winner: ValidatedPlan) -> list[Candidate]:
    """The winner's budgets, in other heads."""
    plan = winner.candidate.plan
    return [Candidate(f"shuffled {seed}", permuted(plan, seed)) for seed in range(NUM_SHUFFLES)]


def _greedy(verdict: ValidationResult, task: SearchTask) -> list[ValidatedPlan]:
    methods = [entry for entry in verdict.ranking if entry.candidate.trial is None and entry is not verdict.winner]
    greedy = [entry for entry in methods if entry.candidate.plan.allocation.method == Greedy.name]
    return sorted(greedy, key=lambda entry: task.goal.loss(entry.metrics))[:1]
