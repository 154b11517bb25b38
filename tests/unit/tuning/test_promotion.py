"""Facts about who is champion: what makes a new plan better than the one that has the alias."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from search_factory import WINDOWS, task

from baklava.plan.budget_plan import BudgetPlan, Provenance
from tuning.optimizers.baselines import baseline_methods
from tuning.selection.promotion import CurrentChampion, PromotionDecision, RegisteredPlan, decide_promotion
from tuning.selection.validation import Candidate, ValidatedPlan
from tuning.study.objective import Goal
from tuning.study.trial import mean_metrics

TEXTS = {"t": "digest of t"}


class WorkerGroup:
    """Scores every plan by a number that a test gives to it."""

    def __init__(self, losses: dict[str, float]) -> None:
        self.losses = losses

    def scores(self, tasks: list[tuple[str, str]], label: str) -> list[dict[str, object]]:
        return [window(name, self.losses[BudgetPlan.model_validate_json(plan).digest]) for plan, name in tasks]


def window(name: str, loss: float) -> dict[str, object]:
    keys = ("nll_full", "nll", "dnll", "kl", "allocated_bytes", "seconds")
    return {**dict.fromkeys(keys, loss), "document": name, "window": name}


def made(budget: float, kind: int = 0, length: int = 2048, texts: dict[str, str] = TEXTS) -> BudgetPlan:
    found = task().profile
    plan = baseline_methods(task().space)[kind].plan(found, budget, length)
    return plan.model_copy(update={"provenance": Provenance(corpora=texts)})


def won(plan: BudgetPlan, loss: float) -> ValidatedPlan:
    windows = tuple(window(name, loss) for name in WINDOWS)
    size = {"ratio": plan.ratio, "bytes_per_sequence": float(plan.bytes_per_sequence)}
    return ValidatedPlan(Candidate("new", plan), windows, {**mean_metrics(windows), **size})


def claimed(
    new: tuple[BudgetPlan, float], old: tuple[BudgetPlan, float], goal: Goal | None = None
) -> PromotionDecision:
    """The claim of a plan that lost so much against one that did, if the latter is the champion."""
    whole, tags = (replace(task(), goal=goal), {"goal": goal.description}) if goal else (task(), {})
    crew, holder = WorkerGroup({old[0].digest: old[1]}), CurrentChampion("3", old[0], tags)
    return decide_promotion(crew, holder, won(*new), WINDOWS, whole, TEXTS)


def test_the_first_plan_of_a_name_is_champion() -> None:
    found = decide_promotion(WorkerGroup({}), None, won(made(0.3), 0.1), WINDOWS, task(), TEXTS)
    assert found == PromotionDecision(True, "champion points to it, the first of its name")


@pytest.mark.parametrize(
    ("sizes", "losses", "crowned", "why"),
    [
        ((0.3, 0.3), (0.1, 0.2), True, "moves to it from version 3: KL 0.1 against 0.2"),
        ((0.2, 0.3), (0.1, 0.2), True, "moves to it from version 3"),
        ((0.3, 0.3), (0.2, 0.1), False, "stays with version 3: KL 0.2 against 0.1"),
        ((0.3, 0.2), (0.1, 0.2), False, "more bytes lose less, which makes no better plan"),
        ((0.2, 0.3), (0.2, 0.1), False, "fewer bytes lose more, which makes no better plan either"),
        ((0.3, 0.2), (0.2, 0.1), False, "stays with version 3"),
    ],
)
def test_a_plan_takes_the_alias_where_it_loses_less_in_no_more_bytes(
    sizes: tuple[float, float], losses: tuple[float, float], crowned: bool, why: str
) -> None:
    found = claimed((made(sizes[0]), losses[0]), (made(sizes[1], kind=1), losses[1]))
    assert found.promoted is crowned
    assert why in found.reason


def test_the_smaller_of_two_plans_within_one_bound_is_champion() -> None:
    goal = Goal(max_dnll=0.5)
    small, large = made(0.2), made(0.3)
    assert claimed((small, 0.4), (large, 0.1), goal).promoted
    assert not claimed((large, 0.1), (small, 0.4), goal).promoted
    assert claimed((large, 0.1), (small, 0.6), goal).promoted  # the small one breaks the bound on these windows


@pytest.mark.parametrize(
    ("old", "why"),
    [
        (lambda: made(0.3, length=1024), "is for 1024 tokens instead of 2048"),
        (lambda: made(0.3, kind=1, texts={"other": "0"}), "was searched on other texts (other)"),
        (lambda: of_another_model(), "was made for another model, other"),
    ],
)
def test_plans_that_do_not_compare_leave_the_alias_where_it_is(old: Callable[[], BudgetPlan], why: str) -> None:
    found = claimed((made(0.3), 0.1), (old(), 0.9))
    assert not found.promoted
    assert f"champion stays with version 3, which {why}" in found.reason


def test_the_same_plan_again_is_what_the_alias_leads_to() -> None:
    found = claimed((made(0.3), 0.1), (made(0.3), 0.1))
    assert found == PromotionDecision(False, "champion stays with version 3, which is the same plan", identical=True)
    registered = RegisteredPlan("baklava-demo", "4", found)
    assert registered.uri == "models:/baklava-demo@champion"
    assert "by hand" not in registered.message


def of_another_model() -> BudgetPlan:
    plan = made(0.3, kind=1)
    return plan.model_copy(update={"model": plan.model.model_copy(update={"id": "other", "config_hash": "1"})})


def test_a_champion_that_cannot_be_read_or_scored_keeps_the_alias() -> None:
    new = won(made(0.3), 0.1)
    unread = decide_promotion(WorkerGroup({}), CurrentChampion("3", None, {}), new, WINDOWS, task(), TEXTS)
    assert unread == PromotionDecision(False, "champion stays with version 3, which cannot be read")
    old = made(0.3, kind=1)
    unscored = decide_promotion(
        WorkerGroup({old.digest: float("nan")}), CurrentChampion("3", old, {}), new, WINDOWS, task(), TEXTS
    )
    assert not unscored.promoted


def test_what_became_of_a_plan_is_told_with_a_way_to_have_it_otherwise() -> None:
    kept = RegisteredPlan(
        "baklava-demo", "4", PromotionDecision(False, "champion stays with version 3, which is better")
    )
    assert kept.uri == "models:/baklava-demo/4"
    assert kept.message.endswith("to move it by hand: make ui, Models, baklava-demo, version 4, add the alias champion")
    assert RegisteredPlan("baklava-demo", "4", PromotionDecision(True, "")).uri == "models:/baklava-demo@champion"
