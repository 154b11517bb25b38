"""Tests of the local search, its pruner, and the choice on validation windows."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler
from search_factory import WINDOWS, record, report, scored, task

from baklava.console import reject_settings_on_resume
from baklava.errors import UserError
from baklava.evaluation.intervals import Interval
from tuning.optimizers.baselines import baseline_methods
from tuning.optimizers.local_search import (
    INITIAL_STEP,
    MIN_STEP,
    LocalSearch,
    PairedPruner,
    direction_vector,
    propose,
    step_size,
)
from tuning.reporting.plots import plot_pareto_front
from tuning.reporting.report import write_report
from tuning.selection.result import Front, SearchResult, write_front
from tuning.selection.validation import (
    Ablation,
    ValidatedPlan,
    ValidationResult,
    log_kl_ratio,
    rank_plans,
    run_ablations,
    select_winner,
    shuffled_candidates,
    trial_candidates,
)
from tuning.study.interrupt import StopFlag
from tuning.study.journal import Journal
from tuning.study.objective import Goal, knee, nearest, non_dominated, subsample
from tuning.study.search_space import SearchTask
from tuning.study.settings import SearchRecord, SearchSettings
from tuning.study.trial import TrialRecord

GEOMETRY = task().profile.geometry


def run(
    values: Callable[[dict[str, object]], float], count: int, task: SearchTask, start: TrialRecord
) -> list[TrialRecord]:
    """Records of refinements whose KL on all windows is what `values` says of their parameters."""
    records, proposed = [start], []
    for number in range(2, count + 2):
        params = propose(task, 0, records, proposed)
        proposed.append(params)
        records.append(record(number, [values(params)] * 4, **params))
    return records


def distance(params: dict[str, object]) -> float:
    """How far the shifts are from a target: layers 0 to 4 want from -1 to 1."""
    wanted = np.linspace(-1, 1, 5)[:, None].repeat(2, 1)
    return float(np.square(np.array(params["shifts"]) - wanted).mean())


def start() -> TrialRecord:
    return record(1, [0.5] * 4)


def test_refinements_go_where_the_measurement_falls_and_never_leave_the_best() -> None:
    records = run(distance, 40, task(), start())
    best = min(records[1:], key=lambda item: item.metrics["kl_geometric"])
    assert best.metrics["kl_geometric"] < 0.25
    for before, item in enumerate(records[1:], start=1):
        so_far = min(records[:before], key=lambda known: known.metrics["kl_geometric"])
        assert item.parent_trial == so_far.trial


def test_nothing_is_accepted_that_measured_no_better() -> None:
    records = run(lambda params: 0.6, 12, task(), start())
    assert {item.parent_trial for item in records[1:]} == {1}
    assert step_size(task(), records) < INITIAL_STEP
    assert step_size(task(), records + [record(n, [0.6] * 4, base=1) for n in range(14, 60)]) == MIN_STEP


def test_after_a_step_that_failed_comes_the_way_back_and_after_one_that_helped_the_same_again() -> None:
    failed = run(lambda params: 0.6, 4, task(), start())
    assert [item.params["direction"] for item in failed[1:]] == [1, -1, 2, -2]
    helped = run(lambda params: 0.4 if params["base"] == 1 else 0.6, 3, task(), start())
    assert [item.params["direction"] for item in helped[1:]] == [1, 1, 2]
    assert helped[2].params["step"] > helped[1].params["step"]


def test_a_refinement_is_plain_json_and_names_its_plan_exactly() -> None:
    params = propose(task(), 0, [start()], [])
    again = json.loads(json.dumps(params))
    assert again == params
    assert task().plan(again).digest == task().plan(params).digest
    assert task().plan(params).digest != task().plan(start().params).digest
    assert task().plan(params).ratio <= 0.3


def test_shifts_are_of_one_length_and_trade_between_layers_or_heads() -> None:
    broad, fine = direction_vector(1, 0, GEOMETRY), direction_vector(2, 0, GEOMETRY)
    assert np.allclose([np.mean(broad**2), np.mean(fine**2)], 1)
    assert np.ptp(broad, axis=1).max() == 0 < np.ptp(fine, axis=1).min()
    assert np.array_equal(direction_vector(-1, 0, GEOMETRY), -broad)
    assert not np.array_equal(direction_vector(3, 0, GEOMETRY), broad)


def test_a_resumed_refinement_proposes_what_the_search_would_have() -> None:
    records = run(distance, 6, task(), start())
    goes_on, resumed = (LocalSearch(task(), 0, Journal(Path("none"), records), StopFlag()) for _ in range(2))
    expected = propose(task(), 0, records, [item.params for item in records[1:]])
    assert goes_on.suggest("a") == resumed.suggest("b") == expected
    assert goes_on.suggest("c") != expected


def test_under_a_bound_a_refinement_of_what_keeps_it_is_smaller() -> None:
    bounded = task(None, max_dnll=0.1)
    kept, broken = record(1, [0.05] * 4, budget=0.2), record(2, [0.2] * 4, budget=0.1)
    assert propose(bounded, 0, [kept, broken], [])["budget"] < 0.2
    assert 0.1 < propose(bounded, 0, [broken.model_copy(update={"trial": 1})], [])["budget"] < 0.2


def test_trials_that_keep_the_bound_reach_validation_beside_those_that_nearly_did() -> None:
    bounded = task(None, max_dnll=0.01)
    losses = [0.0149 - 0.0004 * number for number in range(16)]  # the last three keep it
    records = [
        record(number, [loss] * 4, ratio=0.2 + 0.01 * number, budget=0.2 + 0.01 * number)
        for number, loss in enumerate(losses, start=1)
    ]
    names = [item.name for item in trial_candidates(records, bounded)]
    assert names == [f"trial {number}" for number in range(5, 17)]


def test_a_plan_whose_score_is_no_number_cannot_win() -> None:
    class Broken(FakeWorkerGroup):
        def scores(self, tasks: list[tuple[str, str]], label: str) -> list[dict[str, object]]:
            made = super().scores(tasks, label)
            return [
                {**score, "kl": float("nan")} if plan == tasks[0][0] else score
                for score, (plan, _) in zip(made, tasks, strict=True)
            ]

    result = select_winner(Broken(), [record(1, [0.1] * 4)], WINDOWS, task())
    assert result is not None
    assert all(entry.metrics["kl"] == entry.metrics["kl"] for entry in result.ranking)
    assert "trial 1" not in {entry.candidate.name for entry in result.ranking}


def test_refinements_of_a_front_start_from_its_points_in_turn() -> None:
    front = task(None, front=True)
    records = [record(1, [0.4] * 4, ratio=0.1), record(2, [0.1] * 4, ratio=0.3), record(3, [0.5] * 4, ratio=0.3)]
    proposed: list[dict[str, object]] = []
    for _ in range(4):
        proposed.append(propose(front, 0, records, proposed))
    assert [params["base"] for params in proposed] == [1, 2, 1, 2]


def decisions(values: list[float]) -> list[str]:
    journal = Journal(Path("none"), [record(1, [0.1, 0.2, 0.3, 0.4])])
    trial = SimpleNamespace(config={"base": 1})
    rule = PairedPruner(task(), journal)
    return [rule.on_trial_result(None, trial, report(values[:step])) for step in range(1, 5)]


def test_a_refinement_that_is_behind_its_base_is_stopped_halfway_and_not_earlier() -> None:
    assert decisions([0.2, 0.3, 0.4, 0.5]).index(TrialScheduler.STOP) == len(WINDOWS) // 2 - 1
    assert set(decisions([0.09, 0.19, 0.29, 0.39])) == {TrialScheduler.CONTINUE}
    assert set(decisions([0.2, 0.05, 0.2, 0.9])) == {TrialScheduler.CONTINUE}  # ahead, until all windows are in


def test_validation_decides_between_drawn_and_refined_trials() -> None:
    drawn = [record(number, [0.1 * number] * 4, rounding=8 * number) for number in (1, 2, 4)]
    records = [*drawn[:2], drawn[2].model_copy(update={"trial": 3})]
    refined = [record(number, [0.01] * 4, **propose(task(), number, records, [])) for number in range(4, 9)]
    names = [item.name for item in trial_candidates([*records, *refined], task())]
    assert names[:3] == ["trial 1", "trial 2", "trial 3"]
    assert names[3:] == [f"trial {number}, refined from 1" for number in (4, 5, 6)]


def test_the_smallest_plan_that_keeps_the_bound_wins() -> None:
    entries = [scored("a", 0.2, 0.02), scored("b", 0.3, 0.009), scored("c", 0.25, 0.01)]
    result = rank_plans(entries, Goal(max_dnll=0.01))
    assert result.winner.candidate.name == "c"
    assert [entry.candidate.name for entry in result.ranking] == ["c", "b", "a"]


def test_if_no_plan_is_feasible_the_error_names_the_nearest() -> None:
    entries = [scored("a", 0.2, 0.02), scored("b", 0.3, 0.012)]
    with pytest.raises(UserError, match=r"no plan stays within --max-dnll 0.01 .* b with 30% of the bytes at \+0.0120"):
        rank_plans(entries, Goal(max_dnll=0.01))


def test_a_front_holds_every_plan_that_no_other_beats(tmp_path: Path) -> None:
    entries = [scored("a", 0.1, 0.5), scored("b", 0.2, 0.05), scored("c", 0.3, 0.06), scored("d", 0.4, 0.03)]
    result = rank_plans(entries, Goal(front=True))
    assert [entry.candidate.name for entry in result.front] == ["a", "b", "d"]
    assert result.winner.candidate.name == "b"
    assert rank_plans(entries, Goal(front=True, budget=0.45)).winner.candidate.name == "d"
    write_front(tmp_path, result.front, [entry.candidate.plan for entry in result.front], result.winner)
    points = Front.model_validate_json((tmp_path / "front.json").read_text()).points
    assert [point.plan for point in points if (tmp_path / point.plan).exists()] == [
        f"front/plan-0{number}.json" for number in (1, 2, 3)
    ]
    assert [point.chosen for point in points] == [False, True, False]
    assert 'class="best"' in plot_pareto_front(result, [record(1, [0.1] * 4)], Goal(front=True))


def test_a_front_is_thinned_evenly_and_its_knee_is_below_the_line_between_its_ends() -> None:
    points = [(x, 1 / x) for x in (1.0, 2.0, 4.0, 8.0)]
    assert non_dominated([*points, (4.0, 0.3), (9.0, 1.0)], lambda point: point) == points
    assert subsample(points, 3) == [points[0], points[2], points[3]]
    assert knee([(1.0, 1.0), (2.0, 0.1), (8.0, 0.09)], lambda point: point) == (2.0, 0.1)
    assert knee([(1.0, 1.0)], lambda point: point) == (1.0, 1.0)
    assert nearest(points, lambda point: point[0], 3.0) == (4.0, 0.25)


class FakeWorkerGroup:
    """Scores plans by a random number seeded with the plan, so that no model is needed."""

    def scores(self, tasks: list[tuple[str, str]], label: str) -> list[dict[str, object]]:
        names = ("nll_full", "nll", "dnll", "kl", "allocated_bytes", "seconds")
        return [{**dict.fromkeys(names, random.Random(plan + w).random()), "document": w} for plan, w in tasks]


def test_the_winner_is_compared_with_its_own_budgets_in_other_heads() -> None:
    search_task, group = task(), FakeWorkerGroup()
    result = select_winner(group, [record(1, [0.1] * 4)], WINDOWS, search_task)
    assert result is not None
    compared = run_ablations(group, result, WINDOWS, search_task)
    assert [rival.name for rival in compared] == ["its own budgets, shuffled over the heads 3 times"]
    assert isinstance(compared[0].log_kl_ratio, Interval)
    winner = result.winner.candidate.plan
    for item in shuffled_candidates(result.winner):
        assert np.sort(item.plan.tokens, axis=None).tolist() == np.sort(winner.tokens, axis=None).tolist()
        assert item.plan.bytes_per_sequence == winner.bytes_per_sequence


def test_several_plans_are_above_the_winner_as_their_mean() -> None:
    winner, twice, fourfold = scored("a", 0.2, 0.1), scored("b", 0.2, 0.2), scored("c", 0.2, 0.4)
    assert log_kl_ratio([twice], winner).mean == pytest.approx(np.log(2))
    assert log_kl_ratio([twice, fourfold], winner).mean == pytest.approx(1.5 * np.log(2))


def test_validation_on_one_document_gives_ratios_without_an_interval(tmp_path: Path) -> None:
    ranking = tuple(in_one_document(scored(name, 0.0625, loss)) for name, loss in (("a", 0.1), ("b", 0.2)))
    settings = SearchSettings.from_options(model="m", texts=["t"], context=10, continuation=2, trials=5, budget=0.0625)
    rival, plan = Ablation("b", log_kl_ratio(ranking[1:], ranking[0])), ranking[0].candidate.plan
    result = SearchResult(
        tmp_path, settings, plan, ValidationResult(ranking[0], ranking), (rival,), (record(1, [0.1] * 4),), None
    )
    assert result.ablation_summary == ["b: 2.00 times the winner's KL on validation"]
    write_report(result, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<td>2.00</td>" in page
    assert "in 6.25% of its full bytes" in page


def in_one_document(entry: ValidatedPlan) -> ValidatedPlan:
    whole = {**entry.metrics, "ppl_full": 1.0}
    return replace(entry, windows=tuple({**w, "document": "text"} for w in entry.windows), metrics=whole)


def test_a_budget_is_said_to_its_last_digit() -> None:
    result = [Goal(budget=budget).description for budget in (0.3, 0.125, 0.0625, 0.004)]
    assert result == [f"{percent}% of the bytes" for percent in ("30", "12.5", "6.25", "0.4")]


def test_heuristics_of_drawn_sizes_get_the_size_of_the_winner() -> None:
    front = task(None, front=True)
    records = [record(1, [0.1] * 4, ratio=0.2, budget=0.2), record(2, [0.05] * 4, ratio=0.4, budget=0.4)]
    result = select_winner(FakeWorkerGroup(), records, WINDOWS, front)
    assert result is not None
    names = {item.name for item in baseline_methods(front.space)}
    plans = {entry.candidate.name: entry.candidate.plan for entry in result.ranking}
    assert names <= plans.keys()
    assert {round(plans[name].ratio, 1) for name in names} <= {0.2, 0.4}


def test_under_a_bound_no_heuristic_wins_by_a_rounding() -> None:
    bounded = task(None, max_dnll=1.0)
    result = select_winner(FakeWorkerGroup(), [record(1, [0.1] * 4, ratio=0.2, budget=0.2)], WINDOWS, bounded)
    assert result is not None
    assert result.winner.candidate.name == "trial 1"
    assert len(result.ranking) > 2


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "give --budget, --max-dnll or --front"),
        ({"budget": 0.3, "max_dnll": 0.01}, "--max-dnll 0.01 and --budget are two goals; give one of them"),
        ({"front": True, "max_dnll": 0.01}, "--max-dnll 0.01 and --front are two goals; give one of them"),
        ({"max_dnll": 0.0}, "--max-dnll 0.0 is out of range"),
        ({"max_dnll": float("inf")}, "--max-dnll inf is out of range"),
        ({"budget": 0.3, "refine": 5}, "--refine 5 leaves none of 5 trials"),
        ({"budget": 0.3, "refine": -1}, "--refine -1 is out of range"),
        ({"budget": 0.3, "bits": ("5",)}, "--bits 5 is out of range"),
    ],
)
def test_goals_that_make_no_sense_are_refused(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        SearchSettings.from_options(model="m", texts=["t"], context=10, continuation=2, trials=5, **given)


def test_what_is_resumed_from_a_binary_file_is_refused(tmp_path: Path) -> None:
    for name in ("search.json", "trials.jsonl"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x80\n")
    with pytest.raises(UserError, match=r"has no valid search\.json"):
        SearchRecord.read(tmp_path)
    with pytest.raises(UserError, match=r"cannot read journal .*; restore it, or start again without it"):
        Journal.open(tmp_path / "trials.jsonl", TrialRecord.model_validate_json)


def test_an_option_that_a_resumed_search_does_not_take_is_named_as_it_is_given() -> None:
    with pytest.raises(UserError, match="leave out --max-dnll"):
        reject_settings_on_resume(Path("runs/1"), {"max_dnll": 0.01}, None)


def test_a_front_may_be_given_the_budget_that_chooses_its_point() -> None:
    shared = {"model": "m", "texts": ["t"], "context": 10, "continuation": 2, "trials": 10}
    settings = SearchSettings.from_options(**shared, front=True, budget=0.2)
    assert settings.goal == Goal(front=True, budget=0.2)
    assert settings.num_refinements == 3
