"""Tests of the scheduler: where work goes, and what happens when replicas die. Its processes load no torch."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from search_factory import SPACE, record, task
from search_process import kill

from baklava.errors import UserError
from tuning.optimizers.baselines import initial_params
from tuning.workers.cluster import WorkerGroup, plan_layout
from tuning.workers.scheduler import MAX_DEATHS_PER_TASK, WorkerScheduler, assign_windows

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class FakeWorker:
    """Stands in for a `ScoringWorker`: it records its calls instead of loading a model.

    It cannot start again once the file `broken` exists, and a plan "deadly" kills it.
    """

    def __init__(self, broken: str) -> None:
        if os.path.exists(broken):
            raise UserError("the model is gone")
        self.stored: list[str] = []
        self.scored: list[str] = []
        self.events: list[str] = []

    def scored_windows(self) -> list[str]:
        return self.scored

    def event_log(self) -> list[str]:
        return self.events

    def status(self) -> str | None:
        return f"stores {len(self.stored)} windows" if len(self.stored) < 4 else None

    def ping(self) -> int:
        return os.getpid()

    def prefill(self, window: str) -> None:
        if window.startswith("slow"):
            time.sleep(1)
        self.stored.append(window)
        self.events.append(f"{window} prefilled")

    def release(self, windows: list[str]) -> None:
        self.stored = [window for window in self.stored if window not in windows]

    def score(self, plan: str, window: str) -> dict[str, Any]:
        if plan == "deadly":
            os._exit(1)
        if plan == "wrong":
            return {"error": "this plan is wrong"}
        if plan.startswith("bug"):
            return {"error": "KeyError: 'x'", "traceback": "Traceback (most recent call last):\nKeyError: 'x'\n"}
        if plan.startswith("slow"):
            time.sleep(1 if plan == "slower" else 0.4)
        self.scored.append(window)
        self.events.append(window)
        is_new = window not in self.stored
        self.stored += [window] * is_new
        return {"pid": os.getpid(), "window": window, "prefilled": is_new}

    def double(self, item: int) -> int:
        if item < 0:
            raise UserError(f"{item} is negative")
        if item == 0:
            raise ZeroDivisionError("a bug")
        return 2 * item


class SchedulerHarness:
    """A scheduler with its workers, called without `.remote`."""

    def __init__(self, workers: int, windows: list[str], broken: Path, task: Any = None) -> None:
        self.windows = windows
        self.workers = [FakeWorker.remote(str(broken)) for _ in range(workers)]
        references = {window: ray.put(window) for window in windows}
        self.scheduler = ray.remote(WorkerScheduler).options(num_cpus=0).remote(self.workers, references, task)
        self.pairs = ray.get(self.scheduler.assign.remote(windows))
        prefills = ray.get([self.scheduler.prefill.remote(*pair) for pair in self.pairs])
        assert prefills == [None] * len(self.pairs)

    def pids(self) -> list[int]:
        return ray.get([worker.ping.remote() for worker in self.workers])

    def score(self, *tasks: tuple[str, str]) -> list[dict[str, Any]]:
        return ray.get([self.scheduler.score.remote(*task) for task in tasks], timeout=120)

    def scored(self) -> list[str]:
        scored = ray.get([worker.scored_windows.remote() for worker in self.workers])
        return [window for windows in scored for window in windows]

    def events(self) -> str:
        return " | ".join(ray.get(self.scheduler.take_events.remote()))


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
    yield
    ray.shutdown()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., SchedulerHarness]]:
    started: list[SchedulerHarness] = []

    def make(workers: int = 2, windows: Sequence[str] = "abcd", task: Any = None) -> SchedulerHarness:
        started.append(SchedulerHarness(workers, list(windows), tmp_path / "broken", task))
        return started[-1]

    yield make
    for harness in started:
        for actor in (harness.scheduler, *harness.workers):
            ray.kill(actor)


@pytest.mark.slow
def test_a_window_is_scored_where_it_was_prefilled(start: Callable[..., SchedulerHarness]) -> None:
    harness = start()
    scores = harness.score(*[(f"plan {number}", window) for number, window in enumerate("abcdabcd")])
    assert [score["window"] for score in scores] == list("abcdabcd")
    assert not any(score["prefilled"] for score in scores)
    assert len({score["pid"] for score in scores if score["window"] in "ac"}) == 1


@pytest.mark.slow
def test_a_window_that_is_about_to_be_prefilled_is_waited_for_and_prefilled_nowhere_else(
    start: Callable[..., SchedulerHarness],
) -> None:
    harness = start()
    ray.get([worker.release.remote("abcd") for worker in harness.workers])
    for windows in ("", "abcd"):  # all are assigned again, and none is prefilled yet
        ray.get(harness.scheduler.assign.remote(list(windows)))
    scores = harness.score(*[(f"slow {number}", window) for number, window in enumerate("aaacca")])
    assert len({score["pid"] for score in scores}) == 1
    assert [score["prefilled"] for score in scores].count(True) == 2


@pytest.mark.slow
def test_a_score_waits_for_its_own_window_and_not_for_all_prefills(
    start: Callable[..., SchedulerHarness],
) -> None:
    harness = start(windows=["slow a", "slow b", "slow c", "slow d"])
    ray.get(harness.scheduler.assign.remote([]))
    pairs = ray.get(harness.scheduler.assign.remote(list(harness.windows)))
    assert [window for _, window in pairs] == list(harness.windows)
    prefills = [harness.scheduler.prefill.remote(*pairs[0])]
    harness.events()  # an answer, so that the first one has begun: calls that are sent at once may swap places
    prefills += [harness.scheduler.prefill.remote(*pair) for pair in pairs[1:]]
    harness.score(("plan", "slow a"))
    ray.get(prefills)
    assert ray.get(harness.workers[0].event_log.remote())[-3:] == ["slow a prefilled", "slow a", "slow c prefilled"]


@pytest.mark.slow
def test_a_dead_replica_costs_no_score_and_comes_back_with_its_windows(start: Callable[..., SchedulerHarness]) -> None:
    harness = start()
    kill(harness.pids()[0])
    scores = harness.score(*[(f"slow {number}", window) for number, window in enumerate("abcdabcd")])
    assert [score.get("window") for score in scores] == list("abcdabcd")
    while "replica 1 is back" not in (events := harness.events()):
        assert "not started again" not in events
        time.sleep(0.1)
    scores = harness.score(*[(f"slow again {number}", window) for number, window in enumerate("aabb")])
    assert not any(score["prefilled"] for score in scores)
    assert harness.pids()[0] in {score["pid"] for score in scores if score["window"] == "a"}


def test_the_work_of_a_killed_replica_is_done_again(start: Callable[..., SchedulerHarness]) -> None:
    harness = start(workers=1, windows="a")
    running = harness.scheduler.score.remote("slower", "a")
    time.sleep(0.3)
    kill(harness.pids()[0])
    assert ray.get(running, timeout=120)["window"] == "a"


@pytest.mark.slow
def test_a_plan_that_kills_replicas_is_given_up_and_the_next_one_scored(start: Callable[..., SchedulerHarness]) -> None:
    harness = start(workers=1, windows="a")
    assert f"{MAX_DEATHS_PER_TASK} replicas died" in harness.score(("deadly", "a"))[0]["error"]
    assert harness.score(("plan", "a"))[0]["window"] == "a"


def test_an_error_in_scoring_is_the_answer_and_is_not_tried_again(start: Callable[..., SchedulerHarness]) -> None:
    harness = start()
    assert harness.score(("wrong", "a")) == [{"error": "this plan is wrong"}]
    assert harness.events() == ""


def test_the_traceback_of_a_bug_is_an_event_once_and_the_score_has_the_short_text(
    start: Callable[..., SchedulerHarness],
) -> None:
    harness = start(workers=1, windows="a")
    assert harness.score(("bug 1", "a"), ("bug 2", "a")) == [{"error": "KeyError: 'x'"}] * 2
    assert harness.events() == "replica 1 failed:\nTraceback (most recent call last):\nKeyError: 'x'"


def test_any_method_runs_on_any_idle_replica(start: Callable[..., SchedulerHarness]) -> None:
    harness = start(windows="")
    calls = [harness.scheduler.run.remote("double", [ray.put(item)]) for item in (3, 4, -1)]
    assert ray.get(calls) == [{"result": 6}, {"result": 8}, {"error": "-1 is negative"}]
    assert harness.events() == ""
    failed = ray.get(harness.scheduler.run.remote("double", [ray.put(0)]))
    assert failed == {"error": "ZeroDivisionError: a bug"}
    assert 'raise ZeroDivisionError("a bug")' in harness.events()


@pytest.mark.parametrize("error", [None, KeyError("x")])
def test_workers_end_with_their_block(start: Callable[..., SchedulerHarness], error: Exception | None) -> None:
    group = WorkerGroup(start(workers=2, windows="").workers)
    with suppress(KeyError), group:
        assert list(group.map_unordered("double", [4])) == [8]
        if error:
            raise error
    calls = [partial(worker.double.remote, 1) for worker in group.actors]
    for call in (*calls, group.scheduler.take_events.remote):
        with pytest.raises(RayActorError):
            ask_for_a_minute(call)


def ask_for_a_minute(call: Callable[[], Any]) -> None:
    """Ray ends actors a moment after it was asked to."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ray.get(call(), timeout=60)


def test_items_are_submitted_only_as_results_come(start: Callable[..., SchedulerHarness]) -> None:
    group = WorkerGroup(start(workers=1, windows="").workers)
    submitted: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1, 7):
            submitted.append(item)
            yield item

    results = group.map_unordered("double", items())
    first = next(results)
    assert submitted == [1, 2]
    second = next(results)
    assert submitted == [1, 2, 3]
    assert sorted([first, second, *results]) == [2, 4, 6, 8, 10, 12]
    ray.kill(group.scheduler)


@pytest.mark.slow
def test_if_no_replica_can_come_back_the_score_gives_the_reason_instead_of_waiting(
    start: Callable[..., SchedulerHarness], tmp_path: Path
) -> None:
    harness = start(workers=1, windows="a")
    (tmp_path / "broken").touch()
    kill(harness.pids()[0])
    assert "the model is gone" in harness.score(("plan", "a"))[0]["error"]


def test_no_plan_is_scored_twice_on_a_window_not_even_at_once(start: Callable[..., SchedulerHarness]) -> None:
    harness = start()
    harness.score(("slow", "a"), ("slow", "a"), ("slow", "b"), ("slow", "a"))
    harness.score(("slow", "a"), ("slow", "b"))
    assert sorted(harness.scored()) == ["a", "b"]


@pytest.mark.slow
def test_parameters_of_one_plan_share_its_scores_and_so_do_recorded_ones(
    start: Callable[..., SchedulerHarness],
) -> None:
    first = initial_params(SPACE)[0]
    same = {**first, "floor": first["floor"] + 1e-9}
    assert task().plan(first).digest == task().plan(same).digest
    harness = start(task=task())
    windows = tuple(score | {"window": name} for score, name in zip(record(1, [0.1] * 2).windows, "ab", strict=True))
    ray.get(harness.scheduler.preload_scores.remote([(first, windows)]))
    plans = ray.get([harness.scheduler.plan.remote(params) for params in (first, same)])
    assert plans[0]["json"] == plans[1]["json"]
    known, new = harness.score((plans[1]["json"], "b"), (plans[1]["json"], "c"))
    assert known == windows[1]
    assert new["window"] == "c"
    assert harness.scored() == ["c"]


def test_the_status_names_replicas_that_do_not_store_all_their_windows(start: Callable[..., SchedulerHarness]) -> None:
    assert ray.get(start(workers=1).scheduler.status.remote()) == []
    assert ray.get(start(workers=2).scheduler.status.remote()) == [
        "replica 1 stores 2 windows",
        "replica 2 stores 2 windows",
    ]


def test_windows_that_are_no_longer_assigned_are_released(start: Callable[..., SchedulerHarness]) -> None:
    harness = start()
    ray.get(harness.scheduler.assign.remote(["a", "b"]))
    assert harness.score(("plan", "c"))[0]["prefilled"]


@pytest.mark.parametrize(("replicas", "windows"), [(1, 4), (2, 4), (3, 4), (4, 4), (6, 4), (8, 4), (2, 1)])
def test_windows_are_assigned_evenly_and_every_one_somewhere(replicas: int, windows: int) -> None:
    assigned = assign_windows(replicas, [str(number) for number in range(windows)])
    assert len({len(windows) for windows in assigned}) == 1
    assert set.union(*assigned) == {str(number) for number in range(windows)}


@pytest.mark.parametrize(
    ("nodes", "replicas_option", "replicas", "threads", "gpu"),
    [
        ([{"CPU": 2}], "auto", 2, 1, False),
        ([{"CPU": 16}], "auto", 4, 4, False),
        ([{"CPU": 2}], 1, 1, 2, False),
        ([{"CPU": 4}, {"CPU": 2}], 3, 3, 2, False),
        ([{"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}], "auto", 2, 8, True),
        ([{"CPU": 32}, {"CPU": 8, "GPU": 4}], "auto", 4, 2, True),
        ([{"CPU": 64, "GPU": 1}, {"CPU": 6, "GPU": 3}], "auto", 4, 2, True),
    ],
)
def test_a_layout_has_a_replica_per_gpu_and_threads_that_fit(
    nodes: list[dict[str, float]], replicas_option: int | str, replicas: int, threads: int, gpu: bool
) -> None:
    layout = plan_layout(nodes, replicas_option)
    assert (layout.replicas, layout.threads, layout.gpus) == (replicas, threads, int(gpu))


@pytest.mark.parametrize(
    ("nodes", "replicas_option", "gpus", "replicas", "threads"),
    [
        ([{"CPU": 32, "GPU": 8}], "auto", 4, 2, 16),
        ([{"CPU": 16, "GPU": 3}, {"CPU": 16, "GPU": 2}], "auto", 2, 2, 16),  # a replica never spans two nodes
        ([{"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 4}], 3, 2, 3, 8),
    ],
)
def test_a_replica_of_several_gpus_has_them_on_one_node(
    nodes: list[dict[str, float]], replicas_option: int | str, gpus: int, replicas: int, threads: int
) -> None:
    layout = plan_layout(nodes, replicas_option, gpus)
    assert (layout.replicas, layout.threads, layout.actor_options["num_gpus"]) == (replicas, threads, gpus)


def test_every_node_of_cpus_gets_replicas_of_its_own() -> None:
    assert plan_layout([{"CPU": 8}, {"CPU": 8}, {"CPU": 2}], "auto").replicas == 10


@pytest.mark.parametrize("nodes", [[{"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}], [{"CPU": 8}]])
def test_more_gpus_for_a_replica_than_a_node_has_are_refused(nodes: list[dict[str, float]]) -> None:
    with pytest.raises(UserError, match="2 GPUs of one node for each"):
        plan_layout(nodes, "auto", 2)


def test_more_replicas_than_fit_are_refused_with_what_there_is() -> None:
    with pytest.raises(UserError, match="--replicas 3 does not fit on 2 CPUs"):
        plan_layout([{"CPU": 2}], 3)
