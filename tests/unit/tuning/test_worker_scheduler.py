"""Facts about the pool: where work goes, and what it does when replicas die. Its processes are without torch."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from search_factory import SPACE, record, task
from search_process import kill

from baklava.errors import UserError
from tuning.optimizers.baselines import initial_params
from tuning.workers.cluster import plan_layout
from tuning.workers.scheduler import MAX_DEATHS_PER_TASK, WorkerScheduler, assign_windows

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class Worker:
    """Stands where a replica does, and says what it was asked instead of loading a model.

    It cannot start again once the file `broken` is there, and a plan "deadly" kills it.
    """

    def __init__(self, broken: str) -> None:
        if os.path.exists(broken):
            raise UserError("the model is gone")
        self.held: list[str] = []
        self.scored: list[str] = []
        self.events: list[str] = []

    def windows(self) -> list[str]:
        return self.scored

    def happened(self) -> list[str]:
        return self.events

    def status(self) -> str | None:
        return f"keeps {len(self.held)} windows" if len(self.held) < 4 else None

    def ping(self) -> int:
        return os.getpid()

    def prefill(self, window: str) -> None:
        if window.startswith("slow"):
            time.sleep(1)
        self.held.append(window)
        self.events.append(f"{window} warmed")

    def release(self, windows: list[str]) -> None:
        self.held = [window for window in self.held if window not in windows]

    def score(self, plan: str, window: str) -> dict[str, Any]:
        if plan == "deadly":
            os._exit(1)
        if plan == "wrong":
            return {"error": "this plan is wrong"}
        if plan.startswith("slow"):
            time.sleep(1)
        self.scored.append(window)
        self.events.append(window)
        fresh = window not in self.held
        self.held += [window] * fresh
        return {"pid": os.getpid(), "window": window, "prefilled": fresh}


class Hands:
    """A pool with its workers, called without `.remote`."""

    def __init__(self, workers: int, windows: list[str], broken: Path, task: Any = None) -> None:
        self.windows = windows
        self.workers = [Worker.remote(str(broken)) for _ in range(workers)]
        held = {window: ray.put(window) for window in windows}
        self.pool = ray.remote(WorkerScheduler).options(num_cpus=0).remote(self.workers, held, task)
        self.pairs = ray.get(self.pool.assign.remote(windows))
        assert ray.get([self.pool.prefill.remote(*pair) for pair in self.pairs]) == [None] * len(self.pairs)

    def pids(self) -> list[int]:
        return ray.get([worker.ping.remote() for worker in self.workers])

    def score(self, *tasks: tuple[str, str]) -> list[dict[str, Any]]:
        return ray.get([self.pool.score.remote(*task) for task in tasks], timeout=120)

    def scored(self) -> list[str]:
        return [
            window for windows in ray.get([worker.windows.remote() for worker in self.workers]) for window in windows
        ]

    def told(self) -> str:
        return " | ".join(ray.get(self.pool.take_events.remote()))


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
    yield
    ray.shutdown()


@pytest.fixture
def hands(tmp_path: Path) -> Iterator[Callable[..., Hands]]:
    made: list[Hands] = []

    def make(workers: int = 2, windows: Sequence[str] = "abcd", task: Any = None) -> Hands:
        made.append(Hands(workers, list(windows), tmp_path / "broken", task))
        return made[-1]

    yield make
    for each in made:
        for actor in (each.pool, *each.workers):
            ray.kill(actor)


def test_a_window_is_scored_where_it_was_prefilled(hands: Callable[..., Hands]) -> None:
    pool = hands()
    scores = pool.score(*[(f"plan {number}", window) for number, window in enumerate("abcdabcd")])
    assert [score["window"] for score in scores] == list("abcdabcd")
    assert not any(score["prefilled"] for score in scores)
    assert len({score["pid"] for score in scores if score["window"] in "ac"}) == 1


def test_a_window_that_is_about_to_be_held_is_waited_for_and_prefilled_nowhere_else(
    hands: Callable[..., Hands],
) -> None:
    pool = hands()
    ray.get([worker.release.remote("abcd") for worker in pool.workers])
    for windows in ("", "abcd"):  # all are assigned anew, and not one is warm yet
        ray.get(pool.pool.assign.remote(list(windows)))
    scores = pool.score(*[(f"slow {number}", window) for number, window in enumerate("aaacca")])
    assert len({score["pid"] for score in scores}) == 1
    assert [score["prefilled"] for score in scores].count(True) == 2


def test_a_score_waits_for_its_own_window_and_not_for_all_that_are_still_to_be_held(
    hands: Callable[..., Hands],
) -> None:
    pool = hands(windows=["slow a", "slow b", "slow c", "slow d"])
    ray.get(pool.pool.assign.remote([]))
    pairs = ray.get(pool.pool.assign.remote(list(pool.windows)))
    assert [window for _, window in pairs] == list(pool.windows)
    warming = [pool.pool.prefill.remote(*pair) for pair in pairs]
    pool.score(("plan", "slow a"))
    ray.get(warming)
    assert ray.get(pool.workers[0].happened.remote())[-3:] == ["slow a warmed", "slow a", "slow c warmed"]


def test_a_dead_replica_costs_no_score_and_comes_back_with_its_windows(hands: Callable[..., Hands]) -> None:
    pool = hands()
    kill(pool.pids()[0])
    scores = pool.score(*[(f"slow {number}", window) for number, window in enumerate("abcdabcd")])
    assert [score.get("window") for score in scores] == list("abcdabcd")
    while "replica 1 is back" not in (news := pool.told()):
        assert "stays away" not in news
        time.sleep(0.1)
    scores = pool.score(*[(f"slow again {number}", window) for number, window in enumerate("aabb")])
    assert not any(score["prefilled"] for score in scores)
    assert pool.pids()[0] in {score["pid"] for score in scores if score["window"] == "a"}


def test_a_replica_killed_amid_its_work_has_it_done_again(hands: Callable[..., Hands]) -> None:
    pool = hands(workers=1, windows="a")
    running = pool.pool.score.remote("slow", "a")
    time.sleep(0.3)
    kill(pool.pids()[0])
    assert ray.get(running, timeout=120)["window"] == "a"


def test_a_plan_that_kills_replicas_is_given_up_and_the_next_one_scored(hands: Callable[..., Hands]) -> None:
    pool = hands(workers=1, windows="a")
    assert f"{MAX_DEATHS_PER_TASK} replicas died" in pool.score(("deadly", "a"))[0]["error"]
    assert pool.score(("plan", "a"))[0]["window"] == "a"


def test_an_error_in_scoring_is_the_answer_and_is_not_tried_again(hands: Callable[..., Hands]) -> None:
    pool = hands()
    assert pool.score(("wrong", "a")) == [{"error": "this plan is wrong"}]
    assert pool.told() == ""


def test_when_no_replica_can_come_back_the_reason_is_told_instead_of_waiting(
    hands: Callable[..., Hands], tmp_path: Path
) -> None:
    pool = hands(workers=1, windows="a")
    (tmp_path / "broken").touch()
    kill(pool.pids()[0])
    assert "the model is gone" in pool.score(("plan", "a"))[0]["error"]


def test_no_plan_is_scored_twice_on_a_window_not_even_at_once(hands: Callable[..., Hands]) -> None:
    pool = hands()
    pool.score(("slow", "a"), ("slow", "a"), ("slow", "b"), ("slow", "a"))
    pool.score(("slow", "a"), ("slow", "b"))
    assert sorted(pool.scored()) == ["a", "b"]


def test_parameters_of_one_plan_share_its_scores_and_so_do_recorded_ones(hands: Callable[..., Hands]) -> None:
    first = initial_params(SPACE)[0]
    same = {**first, "floor": first["floor"] + 1e-9}
    assert task().plan(first).digest == task().plan(same).digest
    pool = hands(task=task())
    windows = tuple(score | {"window": name} for score, name in zip(record(1, [0.1] * 2).windows, "ab", strict=True))
    ray.get(pool.pool.preload_scores.remote([(first, windows)]))
    plans = ray.get([pool.pool.plan.remote(params) for params in (first, same)])
    assert plans[0]["json"] == plans[1]["json"]
    known, new = pool.score((plans[1]["json"], "b"), (plans[1]["json"], "c"))
    assert known == windows[1]
    assert new["window"] == "c"
    assert pool.scored() == ["c"]


def test_replicas_that_do_not_keep_all_their_windows_are_named(hands: Callable[..., Hands]) -> None:
    assert ray.get(hands(workers=1).pool.status.remote()) == []
    assert ray.get(hands(workers=2).pool.status.remote()) == ["replica 1 keeps 2 windows", "replica 2 keeps 2 windows"]


def test_windows_no_longer_wanted_are_freed(hands: Callable[..., Hands]) -> None:
    pool = hands()
    ray.get(pool.pool.assign.remote(["a", "b"]))
    assert pool.score(("plan", "c"))[0]["prefilled"]


@pytest.mark.parametrize(("replicas", "windows"), [(1, 4), (2, 4), (3, 4), (4, 4), (6, 4), (8, 4), (2, 1)])
def test_every_replica_holds_as_many_windows_as_any_other_and_every_window_is_held(replicas: int, windows: int) -> None:
    held = assign_windows(replicas, [str(number) for number in range(windows)])
    assert len({len(each) for each in held}) == 1
    assert set.union(*held) == {str(number) for number in range(windows)}


@pytest.mark.parametrize(
    ("nodes", "asked", "replicas", "threads", "gpu"),
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
def test_a_fleet_has_a_replica_per_gpu_and_threads_that_fit(
    nodes: list[dict[str, float]], asked: int | str, replicas: int, threads: int, gpu: bool
) -> None:
    layout = plan_layout(nodes, asked)
    assert (layout.replicas, layout.threads, layout.gpus) == (replicas, threads, int(gpu))


@pytest.mark.parametrize(
    ("nodes", "asked", "gpus", "replicas", "threads"),
    [
        ([{"CPU": 32, "GPU": 8}], "auto", 4, 2, 16),
        ([{"CPU": 16, "GPU": 3}, {"CPU": 16, "GPU": 2}], "auto", 2, 2, 16),  # a replica never spans two nodes
        ([{"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 4}], 3, 2, 3, 8),
    ],
)
def test_a_replica_of_several_gpus_has_them_on_one_node(
    nodes: list[dict[str, float]], asked: int | str, gpus: int, replicas: int, threads: int
) -> None:
    layout = plan_layout(nodes, asked, gpus)
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
