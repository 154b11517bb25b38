"""Facts about the search space, the proposals, and the rule that stops trials early."""

import random
from functools import partial

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler

from baklava.allocation import Baklava
from baklava.eviction import HeavyHitter, Streaming
from baklava.geometry import CacheGeometry, ModelIdentity
from baklava.profile import Profile
from tuning.searcher import COMPARED_TRIALS, GRACE_WINDOWS, Halving, PlanSearch
from tuning.space import distributions_of, evictions, first_params, heuristics, methods_of, suggest
from tuning.task import Task
from tuning.trials import LEAST_KL, TrialRecord, means, objective_of

SOURCES = ("value", "key", "query", "hidden")
WINDOWS = ("a", "b", "c", "d")


def profile() -> Profile:
    source = random.Random(0)
    geometry = CacheGeometry(layers=5, kv_heads=2, query_group=2, head_dim=8, windows=(None,) * 5)
    grid = tuple(tuple(source.random() for _ in range(4)) for _ in range(5))
    return Profile(
        model=ModelIdentity(id="made up", config_hash="0"),
        geometry=geometry,
        windows="none",
        importance=dict.fromkeys(SOURCES, grid),
        layer_importance=tuple(source.random() for _ in range(5)),
    )


def task(budget: float = 0.3) -> Task:
    return Task(profile(), budget, context_length=2048, windows=WINDOWS, objective="kl")


@pytest.fixture(scope="module")
def drawn() -> list[dict[str, object]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask() for _ in range(200)]
    for trial in trials:
        suggest(trial, SOURCES)
    return [trial.params for trial in trials]


def test_every_drawn_plan_keeps_to_the_budget_and_spends_it(drawn: list[dict[str, object]]) -> None:
    ratios = [task().plan(params).ratio for params in drawn]
    assert max(ratios) <= 0.3
    assert min(ratios) > 0.28


def test_a_prefill_records_what_any_drawn_plan_observes_and_nothing_twice(drawn: list[dict[str, object]]) -> None:
    recorded = [eviction.observation for eviction in evictions()]
    assert len(recorded) == len(set(recorded))
    assert {methods_of(params)[1].observation for params in drawn} == set(recorded)


def test_the_first_trials_are_the_heuristics_with_their_default_knobs() -> None:
    baklava_heavy, baklava_far, baklava_streaming, flat_heavy = map(methods_of, first_params())
    assert baklava_heavy == (Baklava(), HeavyHitter())
    assert baklava_far == (Baklava(), HeavyHitter(reduction="max", power=2, distance=32))
    assert baklava_streaming == (Baklava(), Streaming())
    assert flat_heavy == (Baklava(importance_power=0.0), HeavyHitter())


def test_the_first_trials_lie_in_the_space() -> None:
    for params in first_params():
        for name, distribution in distributions_of(params, SOURCES).items():
            assert distribution._contains(distribution.to_internal_repr(params[name]))
        assert params.keys() == distributions_of(params, SOURCES).keys()


def test_a_winner_has_to_beat_both_allocations_with_both_evictions() -> None:
    names = ["uniform + streaming", "uniform + heavy_hitter", "baklava + streaming", "baklava + heavy_hitter"]
    assert sorted(heuristics()) == sorted(names)


def record(number: int, values: list[float], status: str = "finished", **params: object) -> TrialRecord:
    scores = [dict.fromkeys(("nll_full", "nll", "dnll", "kl", "allocated_bytes", "seconds"), value) for value in values]
    mean = sum(values) / len(values) if values else 0.0
    chosen = {**first_params()[0], **params}
    return TrialRecord(
        trial=number, params=chosen, metrics={"kl_geometric": mean}, status=status, windows=tuple(scores)
    )


def report(values: list[float]) -> dict[str, object]:
    return {"objective": sum(values) / len(values), "windows": values, "training_iteration": len(values)}


def searcher(known: list[TrialRecord] | None = None) -> PlanSearch:
    return PlanSearch(SOURCES, task(), seed=0, known=known or [])


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
    assert [search.suggest(name) for name in ("one", "two", "three")] == first_params()[1:]


def test_a_resumed_search_does_not_draw_again_what_was_drawn_before() -> None:
    fresh, resumed = searcher(), searcher([record(1, [0.2] * 4, floor=0.3)])
    draws = [[search.suggest(str(number)) for number in range(6)] for search in (fresh, resumed)]
    assert all(params not in draws[0] for params in draws[1] if params not in first_params())


def decisions(rule: Halving, values: list[float]) -> list[str]:
    return [rule.on_trial_result(None, None, report(values[: step + 1])) for step in range(len(values))]


def test_a_trial_worse_than_half_of_the_others_is_stopped_after_its_grace() -> None:
    rule = Halving(task(), [record(number, [0.1] * 4) for number in range(COMPARED_TRIALS)])
    taken = decisions(rule, [0.2] * 4)
    assert taken.index(TrialScheduler.STOP) == GRACE_WINDOWS - 1


def test_a_trial_better_than_half_of_the_others_goes_on_to_its_end() -> None:
    rule = Halving(task(), [record(number, [0.1] * 4) for number in range(COMPARED_TRIALS)])
    assert set(decisions(rule, [0.05] * 4)) == {TrialScheduler.CONTINUE}


def test_nothing_is_stopped_before_there_are_enough_trials_to_compare_with() -> None:
    rule = Halving(task(), [record(number, [0.1] * 4) for number in range(COMPARED_TRIALS - 1)])
    assert set(decisions(rule, [9.0] * 4)) == {TrialScheduler.CONTINUE}


def test_the_objective_counts_what_a_plan_gains_on_every_window_alike() -> None:
    def kls(*values: float) -> float:
        scores = [record(1, [1.0]).windows[0] | {"kl": value} for value in values]
        return objective_of(means(scores), "kl")

    assert kls(0.01, 0.04, 0.5) == pytest.approx((0.01 * 0.04 * 0.5) ** (1 / 3))
    assert kls(0.009, 0.036, 0.45) == pytest.approx(0.9 * kls(0.01, 0.04, 0.5))
    assert kls(0.0, 0.0) == pytest.approx(LEAST_KL)


def test_recorded_trials_have_parameters_that_the_space_can_read_back(drawn: list[dict[str, object]]) -> None:
    for params in drawn[:20]:
        replayed = optuna.trial.FixedTrial(params)
        partial(suggest, sources=SOURCES)(replayed)
        assert replayed.params == params
