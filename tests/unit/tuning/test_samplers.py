"""Facts about how trials are drawn: samplers by name, an earlier search to start from, Ctrl-C."""

import importlib.util
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from search_factory import SPACE, record, report, task

from baklava.errors import UserError
from baklava.plan.geometry import ModelIdentity
from tuning.optimizers.baselines import initial_params
from tuning.optimizers.optuna_search import (
    PlanOptunaSearch,
    RelativeLossPruner,
    SamplerConfig,
    check_sampler,
    in_space,
)
from tuning.search.trial_loop import NUM_ENQUEUED, WarmStart, concurrency, load_warm_start
from tuning.selection.validation import top_trials
from tuning.study.interrupt import StopFlag, graceful_interrupt
from tuning.study.objective import non_dominated
from tuning.study.settings import SamplerName, SearchRecord, SearchSettings
from tuning.study.trainable import report_failure
from tuning.study.trial import TrialRecord

NAMES = get_args(SamplerName)
DRAWN = 24


def searched(name: str, seed: int = 0, count: int = DRAWN, front: bool = False) -> list[dict[str, object]]:
    """Parameters that a search draws whose trials all lose the distance of `recent` from 0.5."""
    goal = {"budget": None, "front": True} if front else {}
    search = PlanOptunaSearch(task(**goal), SamplerConfig(name, seed, count), [], StopFlag())
    drawn = []
    for number in range(count):
        drawn.append(search.suggest(str(number)))
        loss = abs(drawn[-1].get("recent", 0.9) - 0.5) + 0.01
        search.on_trial_complete(str(number), report([loss] * 4, ratio=drawn[-1].get("budget", 0.3)))
    assert [trial.state for trial in search._ot_study.trials].count(TrialState.COMPLETE) == count
    assert len({json.dumps(params) for params in drawn}) == count  # what was drawn before is drawn anew
    return drawn


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_draws_from_the_space_after_the_heuristics_and_again_the_same(name: str) -> None:
    drawn = searched(name)
    heuristics = [params for params in initial_params(SPACE) if SamplerConfig(name).is_compatible(params)]
    assert drawn[: len(heuristics)] == heuristics
    assert all(in_space(SPACE, params) for params in drawn)
    assert searched(name) == drawn
    assert searched(name, seed=1) != drawn


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cmaes"])
def test_samplers_of_several_objectives_draw_sizes_too(name: str) -> None:
    assert len({params["budget"] for params in searched(name, front=True)}) > DRAWN // 2


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_a_front_of_bytes_loss_and_latency_lowers_all_three(name: str) -> None:
    three = task(None, front=True, latency=True)
    known = [timed(1, 0.2, 0.1, 5.0), timed(2, 0.1, 0.2, 5.0), timed(3, 0.3, 0.3, 1.0), timed(4, 0.3, 0.3, 2.0)]
    search = PlanOptunaSearch(three, SamplerConfig(name, 0, DRAWN), known, StopFlag())
    best = {tuple(trial.values) for trial in search._ot_study.best_trials}
    assert best == {(0.2, 0.1, 5.0), (0.1, 0.2, 5.0), (0.3, 0.3, 1.0)}
    assert non_dominated(known, lambda each: three.goal.pareto_values(each.metrics)) == [known[1], known[0], known[2]]
    for number in range(DRAWN):
        search.suggest(str(number))
        search.on_trial_complete(str(number), {**report([0.2] * 4), "decode_seconds": 1.0})
    complete = search._ot_study.get_trials(states=[TrialState.COMPLETE])
    assert [len(trial.values) for trial in complete] == [3] * (len(known) + DRAWN)


def timed(number: int, ratio: float, loss: float, seconds: float) -> TrialRecord:
    made = record(number, [loss] * 4, ratio=ratio, budget=ratio)
    return made.model_copy(update={"metrics": {**made.metrics, "decode_seconds": seconds}})


def test_latency_alone_is_no_goal() -> None:
    with pytest.raises(UserError, match="--latency is a part of --front"):
        SearchSettings.from_options(
            model="m", texts=["t"], budget=0.3, context=10, continuation=2, trials=8, latency=True
        )


def test_cma_es_moves_all_its_numbers_together_towards_less_loss() -> None:
    drawn = searched("cmaes", count=80)
    assert all(params[name] == value for params in drawn for name, value in SamplerConfig("cmaes").fixed_params.items())
    away = [abs(params["recent"] - 0.5) for params in drawn]
    assert sum(away[-20:]) < sum(away[10:30]) / 2


def test_cma_es_is_refused_for_goals_that_it_does_not_support(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="take nsga2 or tpe"):
        check_sampler("cmaes", front=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install cmaes"):
        check_sampler("cmaes", front=False)


@pytest.mark.parametrize(
    ("trials", "replicas", "concurrent", "expected"),
    [
        (32, 2, None, (3, 1)),
        (32, 16, None, (8, 3)),  # more replicas than trials at once: each trial has several windows in flight
        (10, 2, None, (2, 2)),
        (400, 16, None, (17, 1)),
        (32, 8, 2, (2, 5)),
        (1, 1, None, (2, 1)),
    ],
)
def test_trials_at_a_time_keep_all_replicas_busy_and_leave_the_sampler_some_to_learn_from(
    trials: int, replicas: int, concurrent: int | None, expected: tuple[int, int]
) -> None:
    assert concurrency(settings(trials=trials, concurrent=concurrent), replicas) == expected


def settings(**values: object) -> SearchSettings:
    usual = {"model": "tiny", "texts": ("t",), "context": 10, "continuation": 2, "trials": 8, "budget": 0.3}
    return SearchSettings(**{**usual, **values})


MODEL = ModelIdentity(id="made up", config_hash="0")
MATERIAL = SimpleNamespace(identity=MODEL, corpora={"t": "1"}, profile=task().profile)


def earlier(out: Path, records: list[TrialRecord], **values: object) -> Path:
    """An earlier search as files."""
    out.mkdir()
    digest = MATERIAL.profile.digest
    SearchRecord(settings=settings(**values), model=MODEL, corpora=MATERIAL.corpora, profile=digest, run="r").write(out)
    lines = [json.dumps(each.model_dump(mode="json", exclude_none=True)) + "\n" for each in records]
    (out / "trials.jsonl").write_text("".join(lines) + '{"trial": 9, "par')
    return out


TRIALS = [record(number, [0.1 * number] * 4, floor=0.01 * number) for number in range(1, 7)]


def test_a_warm_start_gives_the_sampler_its_scores_and_tries_the_best_again(tmp_path: Path) -> None:
    out = earlier(tmp_path / "run", [*TRIALS, record(7, [0.01] * 4, base=1, shifts=[[0.0] * 2] * 5)])
    written = (out / "trials.jsonl").read_text()
    warm = load_warm_start(settings(warm_start=str(out)), MATERIAL, task())
    assert list(warm.enqueued_params) == [each.params for each in TRIALS[:NUM_ENQUEUED]]
    assert list(warm.known_trials) == TRIALS[NUM_ENQUEUED:]
    assert list(warm.scored_trials) == TRIALS
    assert (out / "trials.jsonl").read_text() == written  # another search may be writing to it
    search = PlanOptunaSearch(task(), SamplerConfig(), [], StopFlag(), warm.known_trials, warm.enqueued_params)
    assert [search.suggest(str(number)) for number in range(NUM_ENQUEUED)] == list(warm.enqueued_params)
    assert [trial.state for trial in search._ot_study.trials].count(TrialState.COMPLETE) == 2


def test_cma_es_takes_over_no_trial_of_another_eviction_method_and_says_so(tmp_path: Path) -> None:
    params = {key: value for key, value in TRIALS[0].params.items() if key not in ("references", "ridge")}
    hitter = TRIALS[0].model_copy(update={"params": {**params, "eviction": "heavy_hitter", "group_reduction": "max"}})
    out = earlier(tmp_path / "run", [hitter])
    assert load_warm_start(settings(warm_start=str(out)), MATERIAL, task()).scored_trials == (hitter,)
    with pytest.raises(UserError, match="with the same --sampler"):
        load_warm_start(settings(warm_start=str(out), sampler="cmaes"), MATERIAL, task())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"budget": 0.5}, "another size"),
        ({"seed": 1}, "--seed was 1"),
        ({"context": 20}, "--context was 20"),
        ({"budget": None, "front": True}, "another size"),
    ],
)
def test_scores_that_do_not_compare_are_left_and_only_parameters_taken(
    values: dict[str, object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sized = [each.model_copy(update={"params": {**each.params, "budget": 0.4}}) for each in TRIALS]
    out = earlier(tmp_path / "run", sized if values.get("front") else TRIALS, **values)
    warm = load_warm_start(settings(warm_start=str(out)), MATERIAL, task())
    assert warm.scored_trials == ()
    assert warm.enqueued_params
    assert all(in_space(SPACE, params) for params in warm.enqueued_params)
    assert said in capsys.readouterr().err


def test_a_size_is_added_where_the_new_search_draws_it(tmp_path: Path) -> None:
    out, front = earlier(tmp_path / "run", TRIALS), task(None, front=True)
    new = settings(budget=None, front=True, warm_start=str(out))
    warm = load_warm_start(new, MATERIAL, front)
    assert {params["budget"] for params in warm.enqueued_params} == {0.3}
    assert all(in_space(front.space, params) for params in warm.enqueued_params)


def test_a_warm_start_from_another_model_or_from_nothing_is_refused(tmp_path: Path) -> None:
    out = earlier(tmp_path / "run", TRIALS)
    other = SimpleNamespace(**{**vars(MATERIAL), "identity": ModelIdentity(id="other", config_hash="1")})
    with pytest.raises(UserError, match="give a search of the same model"):
        load_warm_start(settings(warm_start=str(out)), other, task())
    with pytest.raises(UserError, match="no finished trial in this search space"):
        load_warm_start(settings(warm_start=str(earlier(tmp_path / "none", []))), MATERIAL, task())
    with pytest.raises(UserError, match=r"--warm-start .* has no valid search.json"):
        load_warm_start(settings(warm_start=str(tmp_path)), MATERIAL, task())
    assert load_warm_start(settings(), MATERIAL, task()) == WarmStart()


def test_the_first_ctrl_c_requests_a_stop_and_the_second_interrupts(capfd: pytest.CaptureFixture[str]) -> None:
    with graceful_interrupt(stop := StopFlag()):
        search = PlanOptunaSearch(task(), SamplerConfig(), [], stop)
        assert search.suggest("before") != Searcher.FINISHED
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert search.suggest("after") == Searcher.FINISHED
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert "Ctrl-C again stops now" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_search_in_the_background_that_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with graceful_interrupt(stop := StopFlag()):
            os.kill(os.getpid(), signal.SIGINT)
        assert not stop.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_cma_es_goes_on_from_what_an_earlier_search_learned() -> None:
    def losing(params: dict[str, object]) -> float:
        return abs(float(params.get("recent", 0.9)) - 0.25) + 0.01

    def drawn(known: list[TrialRecord], count: int) -> list[dict[str, object]]:
        search = PlanOptunaSearch(task(), SamplerConfig("cmaes", 1, 200), [], StopFlag(), known)
        found = []
        for number in range(count):
            found.append(search.suggest(str(number)))
            search.on_trial_complete(str(number), report([losing(found[-1])] * 4))
        return found

    learned = [
        record(number, [losing(params)] * 4).model_copy(update={"params": params})
        for number, params in enumerate(drawn([], 60), 1)
    ]
    begun_anew, gone_on = ([abs(params["recent"] - 0.25) for params in drawn(known, 14)[4:]] for known in ([], learned))
    assert sum(gone_on) < sum(begun_anew) / 4


def test_where_latency_counts_no_trial_is_hopeless_and_the_fastest_reaches_validation() -> None:
    three = task(None, front=True, latency=True)
    known = [timed(1, 0.2, 0.1, 5.0), timed(2, 0.2, 0.3, 1.0), timed(3, 0.2, 0.31, 4.0)]
    assert [each.trial for each in top_trials(known, three.goal, 8)] == [1, 2]
    for goal, said in ((three, TrialScheduler.CONTINUE), (task(None, front=True), TrialScheduler.STOP)):
        result = report([0.3] * 2, ratio=0.2)
        assert RelativeLossPruner(goal, known).on_trial_result(None, None, result) == said


def test_a_trial_that_fails_reports_every_number_that_a_search_lowers(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[dict[str, object]] = []
    monkeypatch.setattr("tuning.study.trainable.tune.report", reported.append)
    report_failure("it broke")
    for goal in (task(), task(None, front=True), task(None, front=True, latency=True)):
        lowered = PlanOptunaSearch(goal, SamplerConfig(), [], StopFlag()).metric
        assert {*([lowered] if isinstance(lowered, str) else lowered)} <= reported[0].keys()


def test_a_warm_start_is_saved_with_the_results(tmp_path: Path) -> None:
    warm = WarmStart(enqueued_params=({"recent": 0.5, "bits": "4"},), scored_trials=(record(1, [0.1] * 4),))
    warm.write(tmp_path)
    assert WarmStart.read(tmp_path) == warm
    assert WarmStart.read(tmp_path / "elsewhere") == WarmStart()
    (tmp_path / "warm.json").write_text("{")
    with pytest.raises(UserError, match="restore it"):
        WarmStart.read(tmp_path)
