"""What the search was worth: the winner against greedy, and against its own budgets dealt out at random."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from baklava.allocation import Greedy, permuted
from baklava.evaluation.bootstrap import Interval
from baklava.evaluation.formatting import with_bounds
from tuning.selection.validation import Candidate, Validated, Verdict, above, validate
from tuning.study.search_space import Task
from tuning.workers.cluster import Crew

SHUFFLES = 3
"""Random permutations of the winner's budgets over its heads."""


@dataclass(frozen=True)
class Rival:
    """Plans that cost no search, and the logarithm of their KL over the winner's on the same windows.

    The winner was chosen on those windows, which flatters it by some hundredths where several plans are as good.
    """

    name: str
    above: Interval


def rivals(crew: Crew, verdict: Verdict, windows: Sequence[str], task: Task) -> tuple[Rival, ...]:
    """The best greedy heuristic, unless it won, and permutations of the winner's budgets."""
    winner = verdict.winner
    dealt = validate(crew, shuffles(winner), windows, task)
    groups = [
        *((entry.candidate.name, [entry]) for entry in _greedy(verdict, task)),
        (f"its own budgets, dealt out at random {len(dealt)} times", dealt),
    ]
    return tuple(Rival(name, above(entries, winner)) for name, entries in groups if entries)


def told(above: Interval) -> str:
    """The ratio whose logarithm this is, with its interval."""
    mean, low, high = (math.exp(value) for value in (above.mean, above.low, above.high))
    return with_bounds(replace(above, mean=mean, low=low, high=high), ".2f")


def shuffles(winner: Validated) -> list[Candidate]:
    """The winner's budgets, in other heads."""
    plan = winner.candidate.plan
    return [Candidate(f"shuffled {seed}", permuted(plan, seed)) for seed in range(SHUFFLES)]


def _greedy(verdict: Verdict, task: Task) -> list[Validated]:
    methods = [entry for entry in verdict.ranking if entry.candidate.trial is None and entry is not verdict.winner]
    greedy = [entry for entry in methods if entry.candidate.plan.allocation.method == Greedy.name]
    return sorted(greedy, key=lambda entry: task.goal.loss(entry.metrics))[:1]
