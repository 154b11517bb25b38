"""Who is champion: the alias moves to a new plan only where that is better on the same windows, in no more bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

from baklava.errors import UserError
from baklava.evaluation.formatting import share
from baklava.plan.budget_plan import BudgetPlan
from tuning.selection.ablation import format_ratio
from tuning.selection.validation import Candidate, ValidatedPlan, log_kl_ratio, byte_ratio, validate
from tuning.study.search_space import SearchTask
from tuning.workers.cluster import WorkerGroup

ALIAS = "champion"

MAX_SIZE_RATIO = 1.01
"""Sizes up to this ratio count as equal: capacities are rounded, so that no two plans hold the same bytes."""


@dataclass(frozen=True)
class CurrentChampion:
    """The registered version that has the alias, with its tags and its plan; None where that cannot be read."""

    version: str
    plan: BudgetPlan | None
    tags: dict[str, str]


@dataclass(frozen=True)
class PromotionDecision:
    """Whether a plan takes the alias, and why, in a sentence; `same` where the plan that has it is equal to it."""

    promoted: bool
    why: str
    same: bool = False

    @property
    def holds(self) -> bool:
        """Whether the alias leads to this plan."""
        return self.promoted or self.same


@dataclass(frozen=True)
class RegisteredPlan:
    """A plan in the registry, and what became of its claim."""

    name: str
    version: str
    claim: PromotionDecision

    @property
    def uri(self) -> str:
        """What jobs/serve.py takes as --plan."""
        return f"models:/{self.name}" + (f"@{ALIAS}" if self.decision.is_champion else f"/{self.version}")

    @property
    def format_ratio(self) -> str:
        """What became of it, and how to have it otherwise."""
        by_hand = f"; to move it by hand: make ui, Models, {self.name}, version {self.version}, add the alias {ALIAS}"
        return f"version {self.version} of {self.name}: {self.claim.why}" + ("" if self.decision.is_champion else by_hand)


def decide_promotion(
    crew: WorkerGroup, holder: CurrentChampion | None, winner: ValidatedPlan, windows: Sequence[str], task: SearchTask, corpora: dict[str, str]
) -> PromotionDecision:
    """Whether the winner of a search takes the alias from the plan that has it.

    Only plans for the same model, texts and length compare, and those on windows that this search scored its winner on:
    scores of an earlier search are of other windows.
    """
    if holder is None:
        return PromotionDecision(True, f"{ALIAS} points to it, the first of its name")
    stays, plan = f"{ALIAS} stays with version {holder.version}, which", winner.candidate.plan
    if holder.plan is None:
        return PromotionDecision(False, f"{stays} cannot be read")
    if holder.plan.digest == plan.digest:
        return PromotionDecision(False, f"{stays} is the same plan", same=True)
    if differs := _difference(holder.plan, plan, corpora):
        return PromotionDecision(False, f"{stays} {differs}")
    entrant = Candidate(f"version {holder.version}, the {ALIAS} so far", holder.plan)
    scored = validate(crew, [entrant], windows, task)
    if not scored:
        return PromotionDecision(False, f"{stays} could not be scored on this search's validation windows")
    return _decided(scored[0], winner, holder, task)


def _difference(old: BudgetPlan, new: BudgetPlan, corpora: dict[str, str]) -> str | None:
    """Why two plans cannot be compared, in words."""
    try:
        old.check_fits(new.model, new.geometry)
    except UserError:
        return f"was made for another model, {old.model.id}"
    if old.context_length != new.context_length:
        return f"is for {old.context_length} tokens instead of {new.context_length}"
    if set(old.provenance.corpora.values()) != set(corpora.values()):
        return f"was searched on other texts ({', '.join(old.provenance.corpora) or 'unknown'})"
    return None


def _decided(old: ValidatedPlan, new: ValidatedPlan, holder: CurrentChampion, task: SearchTask) -> PromotionDecision:
    goal = task.goal
    losses = [goal.loss(entry.metrics) for entry in (new, old)]
    sizes = [byte_ratio(entry) for entry in (new, old)]
    found = f"{goal.loss_name} {losses[0]:.4g} against {losses[1]:.4g} on the same validation windows"
    found += f", {share(sizes[0])} of the bytes against {share(sizes[1])}"
    found += f" (its KL is {format_ratio(log_kl_ratio([old], new))} times the new one's)"
    if holder.tags.get("goal") == goal.description and goal.max_dnll is not None:
        better = goal.objective_value(new.metrics) < goal.objective_value(old.metrics)  # both were to be small within one bound
    else:
        better = sizes[0] <= MAX_SIZE_RATIO * sizes[1] and losses[0] < losses[1]
    if better:
        return PromotionDecision(True, f"{ALIAS} moves to it from version {holder.version}: {found}")
    return PromotionDecision(False, f"{ALIAS} stays with version {holder.version}: {found}{_because(losses, sizes)}")


def _because(losses: Sequence[float], sizes: Sequence[float]) -> str:
    if losses[0] < losses[1]:
        return "; more bytes lose less, which makes no better plan"
    if sizes[0] * MAX_SIZE_RATIO < sizes[1]:
        return "; fewer bytes lose more, which makes no better plan either"
    return ""
