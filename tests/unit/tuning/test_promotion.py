"""Tests of promotion: what makes a new plan better than the one that has the alias."""

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


class FakeWorkerGroup:
    """Scores every plan by the loss that a test gives it."""

    def __init__(self, losses: dict[str, float]) -> None:
        self.losses = losses

    def scores(self, tasks: list[tuple[str, str]], label: str) -> list[dict[str, object]]:
        return [window(name, self.losses[BudgetPlan.model_validate_json(plan).digest]) for plan, name in tasks]


def window(name: str, loss: float) -> dict[str, object]:
    keys = ("nll_full", "nll", "dnll", "kl", "allocated_bytes", "seconds")
    return {**dict.fromkeys(keys, loss), "document": name, "window": name}


def make_plan(budget: float, kind: int = 0, length: int = 2048, texts: dict[str, str] = TEXTS) -> BudgetPlan:
    plan = baseline_methods(task().space)[kind].plan(task().profile, budget, length)
    return plan.model_copy(update={"provenance": Provenance(corpora=texts)})


def validated(plan: BudgetPlan, loss: float) -> ValidatedPlan:
    windows = tuple(window(name, loss) for name in WINDOWS)
    size = {"ratio": plan.ratio, "bytes_per_sequence": float(plan.bytes_per_sequence)}
    return ValidatedPlan(Candidate("new", plan), windows, {**mean_metrics(windows), **size})


def decision_between(
    new: tuple[BudgetPlan, float], old: tuple[BudgetPlan, float], goal: Goal | None = None
) -> PromotionDecision:
    """Return the decision on a (plan, loss) if another (plan, loss) is the champion."""
    search_task, tags = (replace(task(), goal=goal), {"goal": goal.description}) if goal else (task(), {})
    group, champion = FakeWorkerGroup({old[0].digest: old[1]}), CurrentChampion("3", old[0], tags)
    return decide_promotion(group, champion, validated(*new), WINDOWS, search_task, TEXTS)


def test_the_first_plan_of_a_name_is_champion() -> None:
    decision = decide_promotion(FakeWorkerGroup({}), None, validated(make_plan(0.3), 0.1), WINDOWS, task(), TEXTS)
    assert decision == PromotionDecision(True, "champion points to it, the first of its name")


@pytest.mark.parametrize(
    ("sizes", "losses", "promoted", "reason"),
    [
        ((0.3, 0.3), (0.1, 0.2), True, "moves to it from version 3: KL 0.1 against 0.2"),
        ((0.2, 0.3), (0.1, 0.2), True, "moves to it from version 3"),
        ((0.3, 0.3), (0.2, 0.1), False, "stays with version 3: KL 0.2 against 0.1"),
        ((0.3, 0.2), (0.1, 0.2), False, "more bytes lose less, which makes no better plan"),
        ((0.2, 0.3), (0.2, 0.1), False, "fewer bytes lose more, which makes no better plan either"),
        ((0.3, 0.2), (0.2, 0.1), False, "stays with version 3"),
    ],
)
def test_a_plan_takes_the_alias_if_it_loses_less_in_no_more_bytes(
    sizes: tuple[float, float], losses: tuple[float, float], promoted: bool, reason: str
) -> None:
    decision = decision_between((make_plan(sizes[0]), losses[0]), (make_plan(sizes[1], kind=1), losses[1]))
    assert decision.promoted is promoted
    assert reason in decision.reason


def test_the_smaller_of_two_plans_within_one_bound_is_champion() -> None:
    goal = Goal(max_dnll=0.5)
    small, large = make_plan(0.2), make_plan(0.3)
    assert decision_between((small, 0.4), (large, 0.1), goal).promoted
    assert not decision_between((large, 0.1), (small, 0.4), goal).promoted
    assert decision_between(
        (large, 0.1), (small, 0.6), goal
    ).promoted  # the small one breaks the bound on these windows


@pytest.mark.parametrize(
    ("old", "reason"),
    [
        (lambda: make_plan(0.3, length=1024), "is for 1024 tokens instead of 2048"),
        (lambda: make_plan(0.3, kind=1, texts={"other": "0"}), "was searched on other texts (other)"),
        (lambda: of_another_model(), "was made for another model, other"),
    ],
)
def test_plans_that_do_not_compare_leave_the_alias_alone(old: Callable[[], BudgetPlan], reason: str) -> None:
    decision = decision_between((make_plan(0.3), 0.1), (old(), 0.9))
    assert not decision.promoted
    assert f"champion stays with version 3, which {reason}" in decision.reason


def test_the_same_plan_again_is_what_the_alias_points_to() -> None:
    decision = decision_between((make_plan(0.3), 0.1), (make_plan(0.3), 0.1))
    assert decision == PromotionDecision(False, "champion stays with version 3, which is the same plan", identical=True)
    registered = RegisteredPlan("baklava-demo", "4", decision)
    assert registered.uri == "models:/baklava-demo@champion"
    assert "by hand" not in registered.message


def of_another_model() -> BudgetPlan:
    plan = make_plan(0.3, kind=1)
    return plan.model_copy(update={"model": plan.model.model_copy(update={"id": "other", "config_hash": "1"})})


def test_a_champion_that_cannot_be_read_or_scored_keeps_the_alias() -> None:
    new = validated(make_plan(0.3), 0.1)
    unread = decide_promotion(FakeWorkerGroup({}), CurrentChampion("3", None, {}), new, WINDOWS, task(), TEXTS)
    assert unread == PromotionDecision(False, "champion stays with version 3, which cannot be read")
    old = make_plan(0.3, kind=1)
    unscored = decide_promotion(
        FakeWorkerGroup({old.digest: float("nan")}), CurrentChampion("3", old, {}), new, WINDOWS, task(), TEXTS
    )
    assert not unscored.promoted


def test_the_decision_is_explained_with_a_way_to_override_it() -> None:
    kept = RegisteredPlan(
        "baklava-demo", "4", PromotionDecision(False, "champion stays with version 3, which is better")
    )
    assert kept.uri == "models:/baklava-demo/4"
    assert kept.message.endswith("to move it by hand: make ui, Models, baklava-demo, version 4, add the alias champion")
    assert RegisteredPlan("baklava-demo", "4", PromotionDecision(True, "")).uri == "models:/baklava-demo@champion"
