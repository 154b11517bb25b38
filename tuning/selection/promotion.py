"""Promotion: the champion alias moves to a new plan only if it is better on the same windows and no larger."""

from collections.abc import Sequence
from dataclasses import dataclass

from baklava.errors import UserError
from baklava.evaluation.intervals import format_share
from baklava.plan.budget_plan import BudgetPlan
from tuning.selection.validation import Candidate, ValidatedPlan, byte_ratio, format_ratio, log_kl_ratio, validate
from tuning.study.search_space import SearchTask
from tuning.workers.cluster import WorkerGroup

ALIAS = "champion"

MAX_SIZE_RATIO = 1.01
"""Sizes up to this ratio count as equal: capacities are rounded, so that no two plans have the same bytes."""


@dataclass(frozen=True)
class CurrentChampion:
    """The registered version that has the alias, with its tags and its plan; the plan is None if it is unreadable."""

    version: str
    plan: BudgetPlan | None
    tags: dict[str, str]


@dataclass(frozen=True)
class PromotionDecision:
    """Whether a plan takes the alias, and why, in a sentence; `identical` if the champion is the same plan."""

    promoted: bool
    reason: str
    identical: bool = False

    @property
    def is_champion(self) -> bool:
        """Whether the alias points to this plan."""
        return self.promoted or self.identical


@dataclass(frozen=True)
class RegisteredPlan:
    """A plan in the registry, and the decision about the alias."""

    name: str
    version: str
    decision: PromotionDecision

    @property
    def uri(self) -> str:
        """What baklava-serve takes as --plan."""
        return f"models:/{self.name}" + (f"@{ALIAS}" if self.decision.is_champion else f"/{self.version}")

    @property
    def message(self) -> str:
        """The decision in words, and how to override it."""
        by_hand = f"; to move it by hand: make ui, Models, {self.name}, version {self.version}, add the alias {ALIAS}"
        message = f"version {self.version} of {self.name}: {self.decision.reason}"
        return message if self.decision.is_champion else message + by_hand


def decide_promotion(
    group: WorkerGroup,
    champion: CurrentChampion | None,
    winner: ValidatedPlan,
    windows: Sequence[str],
    task: SearchTask,
    corpora: dict[str, str],
) -> PromotionDecision:
    """Decide whether the winner of a search takes the alias from the current champion.

    Only plans for the same model, texts and length compare, on the windows that this search scored its winner on: the
    scores of an earlier search are of other windows.
    """
    if champion is None:
        return PromotionDecision(True, f"{ALIAS} points to it, the first of its name")
    stays, plan = f"{ALIAS} stays with version {champion.version}, which", winner.candidate.plan
    if champion.plan is None:
        return PromotionDecision(False, f"{stays} cannot be read")
    if champion.plan.digest == plan.digest:
        return PromotionDecision(False, f"{stays} is the same plan", identical=True)
    if reason := _incompatibility(champion.plan, plan, corpora):
        return PromotionDecision(False, f"{stays} {reason}")
    challenged = Candidate(f"version {champion.version}, the {ALIAS} so far", champion.plan)
    scored = validate(group, [challenged], windows, task)
    if not scored:
        return PromotionDecision(False, f"{stays} could not be scored on this search's validation windows")
    return _compare(scored[0], winner, champion, task)


def _incompatibility(old: BudgetPlan, new: BudgetPlan, corpora: dict[str, str]) -> str | None:
    """Why two plans do not compare, in words."""
    try:
        old.validate_for(new.model, new.geometry)
    except UserError:
        return f"was made for another model, {old.model.id}"
    if old.context_length != new.context_length:
        return f"is for {old.context_length} tokens instead of {new.context_length}"
    if set(old.provenance.corpora.values()) != set(corpora.values()):
        return f"was searched on other texts ({', '.join(old.provenance.corpora) or 'unknown'})"
    return None


def _compare(old: ValidatedPlan, new: ValidatedPlan, champion: CurrentChampion, task: SearchTask) -> PromotionDecision:
    goal = task.goal
    new_loss, old_loss = goal.loss(new.metrics), goal.loss(old.metrics)
    new_size, old_size = byte_ratio(new), byte_ratio(old)
    comparison = (
        f"{goal.loss_name} {new_loss:.4g} against {old_loss:.4g} on the same validation windows, "
        f"{format_share(new_size)} of the bytes against {format_share(old_size)} "
        f"(its KL is {format_ratio(log_kl_ratio([old], new))} times the new one's)"
    )
    if champion.tags.get("goal") == goal.description and goal.max_dnll is not None:
        # Both were searched for the smallest size within the same bound.
        is_better = goal.objective_value(new.metrics) < goal.objective_value(old.metrics)
    else:
        is_better = new_size <= MAX_SIZE_RATIO * old_size and new_loss < old_loss
    if is_better:
        return PromotionDecision(True, f"{ALIAS} moves to it from version {champion.version}: {comparison}")
    if new_loss < old_loss:
        why = "; more bytes lose less, which makes no better plan"
    elif new_size * MAX_SIZE_RATIO < old_size:
        why = "; fewer bytes lose more, which makes no better plan either"
    else:
        why = ""
    return PromotionDecision(False, f"{ALIAS} stays with version {champion.version}: {comparison}{why}")
