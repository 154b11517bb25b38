"""Facts about the search space, the proposals, and the rule that stops trials early."""

from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler
from search_factory import SPACE, WINDOWS, profile, record, report, task

from baklava.allocation import Blended, Perturbed
from baklava.plan.budget_plan import PrefillConfig
from baklava.profiling.profile import LossCurves
from tuning.optimizers.baselines import (
    BEST_HEAVY_HITTER,
    BEST_MATCHING,
    DEFAULT_BLEND,
    baseline_methods,
    initial_params,
)
from tuning.optimizers.optuna_search import MAX_LOSS_RATIO, PlanOptunaSearch, RelativeLossPruner, SamplerConfig
from tuning.selection.validation import baseline_candidates
from tuning.study.interrupt import StopFlag
from tuning.study.objective import Goal
from tuning.study.search_space import (
    BIT_PAIRS,
    SearchSpace,
    SearchTask,
    allocation_from_params,
    budget_range_for,
    eviction_from_params,
    recorded_evictions,
)
from tuning.study.settings import ALL_BITS
from tuning.study.trial import GRACE_WINDOWS, MIN_KL, TrialRecord, mean_metrics

WHOLE = SearchSpace(ALL_BITS, has_reconstruction=True, has_loss_curves=True)


def draws(space: SearchSpace, count: int = 200) -> list[dict[str, object]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask() for _ in range(count)]
    for trial in trials:
        space.suggest(trial)
    return [trial.params for trial in trials]


@pytest.fixture(scope="module")
def drawn() -> list[dict[str, object]]:
    return draws(SPACE)


def test_every_drawn_plan_keeps_to_the_budget_and_spends_it(drawn: list[dict[str, object]]) -> None:
    plans = [task().plan(params) for params in drawn]
    assert max(plan.ratio for plan in plans) <= 0.3
    whole = [plan for plan in plans if min(map(min, plan.tokens)) < plan.context_length]
    assert min(plan.ratio for plan in whole if max(map(max, plan.tokens)) < plan.context_length) > 0.27


def test_a_drawn_plan_stores_in_the_bits_and_steps_that_it_drew(drawn: list[dict[str, object]]) -> None:
    for params in drawn[:50]:
        plan = task().plan(params)
        layer = plan.layers[0]
        assert layer is not None
        assert (layer.key_bits[0], layer.value_bits[0]) == BIT_PAIRS[params["bits"]]
        least, most = plan.eviction.min_tokens, plan.context_length
        free = [tokens for row in plan.tokens for tokens in row if least < tokens < most]
        assert all(tokens % params["rounding"] in (0, least % params["rounding"]) for tokens in free)


def test_a_prefill_records_what_any_drawn_plan_observes_and_nothing_twice(drawn: list[dict[str, object]]) -> None:
    recorded = [(eviction.score_key, eviction.reference_key) for eviction in recorded_evictions(True)]
    assert len(recorded) == len(set(recorded))
    needed = map(eviction_from_params, drawn)
    assert {(eviction.score_key, eviction.reference_key) for eviction in needed} == set(recorded)


def test_a_prefill_records_what_every_heuristic_observes() -> None:
    recorded = {eviction.score_key for eviction in recorded_evictions(True)}
    assert {each.eviction.score_key for each in baseline_methods(SPACE)} <= recorded
    assert {BEST_HEAVY_HITTER.score_key, BEST_MATCHING.score_key} <= recorded


def test_a_model_whose_queries_cannot_be_moved_is_searched_without_methods_that_move_them() -> None:
    still = SearchSpace.for_profile(profile().model_copy(update={"moves_queries": False}), ALL_BITS, None)
    drawn = [*draws(still, 50), *initial_params(still)]
    recorded = {eviction.score_key: eviction for eviction in recorded_evictions(False)}
    assert {eviction_from_params(params).score_key for params in drawn} == set(recorded)
    assert not any(eviction.num_references for eviction in recorded.values())
    assert not any(method.eviction.num_references for method in baseline_methods(still))


def test_the_first_trials_are_the_strongest_blends_and_then_one_measure_each_in_4_bits() -> None:
    points = initial_params(WHOLE)
    assert [params["bits"] for params in points] == ["curves"] * 4 + ["4"] * 4
    evictions = [eviction_from_params(params) for params in points]
    assert [each.num_references for each in evictions] == [256, 1024, 1024] + [256] * 5
    assert [each.residual_length for each in evictions] == [8, 0, 0] + [16] * 5
    assert {each.eviction_interval for each in evictions} == {8}
    assert {each.score_key for each in (*evictions[:1], *evictions[3:])} == {BEST_MATCHING.score_key}
    assert allocation_from_params(points[0]) == DEFAULT_BLEND
    assert [params["allocation"] for params in points[:4]] == ["blended"] * 3 + ["greedy"]
    assert allocation_from_params(points[1]) == DEFAULT_BLEND
    counts, greedy, baklava, flat = points[4:]
    assert allocation_from_params(counts) == Blended(reconstruction_power=1.0, floor=0.0)
    assert greedy["allocation"] == "greedy"
    assert allocation_from_params(baklava) == Blended(reconstruction_power=0.0, importance_power=2.0, floor=0.1)
    assert allocation_from_params(flat) == Blended(reconstruction_power=0.0, floor=0.0)


@pytest.mark.parametrize("space", [SPACE, WHOLE, SearchSpace(("16",), False, False, budget_range=(0.05, 0.6))])
def test_the_first_trials_lie_in_the_space(space: SearchSpace) -> None:
    for params in initial_params(space):
        for name, distribution in space.distributions(params).items():
            assert distribution._contains(distribution.to_internal_repr(params[name]))
        assert params.keys() == space.distributions(params).keys()


def test_where_sizes_are_drawn_the_strongest_heuristic_is_tried_at_several() -> None:
    points = initial_params(task(None, front=True).space)
    strongest = [params["budget"] for params in points if {**params, "budget": 0} == {**points[0], "budget": 0}]
    assert len(set(strongest)) == len(strongest) == 4
    assert 0.02 < min(strongest) < 0.1 < 0.3 < max(strongest) < 0.6


def test_the_smallest_size_that_is_drawn_holds_whatever_else_is_drawn() -> None:
    small = SearchTask(profile(), Goal(max_dnll=0.1), context_length=192, windows=WINDOWS)
    least, most = budget_range_for(profile().geometry, 192)
    assert 0.02 < least < most <= 1
    for params in draws(small.space, 50):
        assert small.plan({**params, "budget": least}).ratio <= least


def test_all_plans_of_a_search_prefill_as_it_says() -> None:
    chunked = replace(task(), prefill=PrefillConfig.in_chunks(64))
    plans = [chunked.plan(params) for params in draws(chunked.space, 5)]
    plans += [candidate.plan for candidate in baseline_candidates(chunked, 0.3)]
    assert {plan.prefill.chunk_size for plan in plans} == {64}
    assert {task().plan(params).prefill.mode for params in draws(SPACE, 5)} == {"dense"}


def test_what_the_profile_did_not_measure_is_not_drawn() -> None:
    drawn = draws(SPACE, 50)
    assert not any({"reconstruction_power", "curve_power"} & params.keys() for params in drawn)
    assert all(params["bits"] != "curves" for params in drawn)
    assert {params["allocation"] for params in draws(WHOLE, 50)} == {"blended", "greedy"}


def test_bits_without_loss_curves_are_left_out_where_the_others_have_them() -> None:
    curves = LossCurves(eviction=BEST_HEAVY_HITTER.config, entries=(1,), bits=((16, 16), (5, 4), (4, 4)), losses={})
    measured = profile().model_copy(update={"curves": curves})
    assert SearchSpace.for_profile(measured, ALL_BITS, None).bits == ("16", "k5v4", "4", "curves")
    assert SearchSpace.for_profile(measured, ("k8v4",), None) == SearchSpace(
        ("k8v4",), has_reconstruction=False, has_loss_curves=False
    )


def test_shifts_are_a_part_of_the_plan(drawn: list[dict[str, object]]) -> None:
    base = {**initial_params(SPACE)[0], "bits": "16"}
    shifts = [[1.0, -1.0]] + [[0.0, 0.0]] * 4
    refined = {**base, "shifts": shifts, "base": 1, "direction": 1, "step": 0.4}
    assert isinstance(allocation_from_params(refined), Perturbed)
    (before, after), others = zip(task().plan(base).tokens[0], task().plan(refined).tokens[0], strict=True)
    assert after > before
    assert others[1] < others[0]


def searcher(known: list[TrialRecord] | None = None, **goal: object) -> PlanOptunaSearch:
    return PlanOptunaSearch(task(**goal), SamplerConfig(), known or [], StopFlag())


def test_optuna_learns_which_trials_finished_were_stopped_or_failed() -> None:
    search = searcher()
    for name in ("finished", "stopped", "failed", "dead"):
        search.suggest(name)
    search.on_trial_result("finished", report([0.1]))
    search.on_trial_result("stopped", report([0.3]))
    search.on_trial_complete("finished", report([0.1] * 4))
    search.on_trial_complete("stopped", report([0.3] * 2))
    search.on_trial_complete("failed", {"objective": 1e9, "failed": "no room"})
    search.on_trial_complete("dead", error=True)
    states = [trial.state for trial in search._ot_study.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL]
    assert search._ot_study.best_value == pytest.approx(0.1)


def test_a_resumed_search_knows_what_was_recorded_and_tries_only_the_heuristics_that_are_missing() -> None:
    known = [record(1, [0.2] * 4), record(2, [0.4] * 2, "pruned", floor=0.3), record(3, [], "failed", floor=0.4)]
    search = searcher(known)
    states = [trial.state for trial in search._ot_study.get_trials(states=None)]
    recalled = [state for state in states if state != TrialState.WAITING]
    assert recalled == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    missing = initial_params(SPACE)[1:]
    assert [search.suggest(f"next {number}") for number in range(len(missing))] == missing


def test_a_resumed_search_does_not_draw_again_what_was_drawn_before() -> None:
    fresh, resumed = searcher(), searcher([record(1, [0.2] * 4, floor=0.3)])
    count = len(initial_params(SPACE)) + 3
    first, again = ([search.suggest(str(number)) for number in range(count)] for search in (fresh, resumed))
    assert all(params not in first for params in again if params not in initial_params(SPACE))


def decisions(rule: RelativeLossPruner, values: list[float], ratio: float = 0.3) -> list[str]:
    return [rule.on_trial_result(None, None, report(values[: step + 1], ratio)) for step in range(len(values))]


GOES_ON = {TrialScheduler.CONTINUE}


def test_a_trial_far_behind_the_best_on_the_same_windows_is_stopped_after_its_grace() -> None:
    rule = RelativeLossPruner(task(), [record(1, [0.1] * 4), record(2, [0.5] * 4)])
    assert decisions(rule, [0.2] * 4).index(TrialScheduler.STOP) == GRACE_WINDOWS - 1
    assert set(decisions(rule, [0.9 * MAX_LOSS_RATIO * 0.1] * 4)) == GOES_ON


def test_windows_that_are_hard_for_all_plans_stop_none() -> None:
    rule = RelativeLossPruner(task(), [record(1, [0.9, 0.9, 0.01, 0.01])])
    assert set(decisions(rule, [0.8, 0.8, 0.02, 0.01])) == GOES_ON


def test_a_trial_that_ends_becomes_what_others_are_compared_with_and_a_stopped_one_does_not() -> None:
    rule = RelativeLossPruner(task(), [record(1, [0.01] * 2, "pruned")])
    assert set(decisions(rule, [0.9] * 4)) == GOES_ON
    assert set(decisions(rule, [0.1] * 4)) == GOES_ON
    assert TrialScheduler.STOP in decisions(rule, [0.2] * 4)


def test_where_sizes_are_drawn_a_trial_is_compared_with_those_that_are_no_larger() -> None:
    rule = RelativeLossPruner(task(None, front=True), [record(1, [0.1] * 4, ratio=0.2)])
    assert set(decisions(rule, [0.3] * 4, ratio=0.1)) == GOES_ON
    assert TrialScheduler.STOP in decisions(rule, [0.3] * 4, ratio=0.4)


def test_a_front_lowers_bytes_and_loss_together() -> None:
    small, large = record(1, [0.4] * 4, ratio=0.1, budget=0.1), record(2, [0.1] * 4, ratio=0.3, budget=0.3)
    worse = record(3, [0.5] * 4, ratio=0.3, budget=0.31)
    search = searcher([small, large, worse], budget=None, front=True)
    assert {tuple(trial.values) for trial in search._ot_study.best_trials} == {(0.1, 0.4), (0.3, 0.1)}
    for number in range(12):
        params = search.suggest(str(number))
        search.on_trial_result(str(number), report([0.2]))
        whole = number % 2 == 0
        search.on_trial_complete(str(number), report([0.2] * (4 if whole else 2), ratio=params["budget"]))
    states = [trial.state for trial in search._ot_study.trials]
    assert (states.count(TrialState.COMPLETE), states.count(TrialState.PRUNED)) == (9, 6)


def test_under_a_bound_the_least_bytes_win_and_what_breaks_it_comes_after() -> None:
    goal = Goal(max_dnll=0.01)
    within, smaller = {"dnll": 0.009, "ratio": 0.3}, {"dnll": 0.01, "ratio": 0.2}
    broken, worse = {"dnll": 0.011, "ratio": 0.1}, {"dnll": 0.02, "ratio": 0.05}
    values = [goal.objective_value(metrics) for metrics in (smaller, within, broken, worse)]
    assert values == sorted(values)
    assert values[:2] == [0.2, 0.3]


def test_the_objective_counts_what_a_plan_gains_on_every_window_alike() -> None:
    def kls(*values: float) -> float:
        scores = [record(1, [1.0]).windows[0] | {"kl": value} for value in values]
        return Goal().objective_value(mean_metrics(scores))

    assert kls(0.01, 0.04, 0.5) == pytest.approx((0.01 * 0.04 * 0.5) ** (1 / 3))
    assert kls(0.009, 0.036, 0.45) == pytest.approx(0.9 * kls(0.01, 0.04, 0.5))
    assert kls(0.0, 0.0) == pytest.approx(MIN_KL)


@pytest.mark.parametrize("space", [SPACE, WHOLE])
def test_recorded_trials_have_parameters_that_the_space_can_read_back(space: SearchSpace) -> None:
    for params in draws(space, 20):
        replayed = optuna.trial.FixedTrial(params)
        space.suggest(replayed)
        assert replayed.params == params
