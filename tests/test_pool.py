"""Facts about the pool: where work goes, and what it does when replicas die. Its processes are without torch."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from searching import kill

from baklava.errors import UserError
from tuning.cluster import fleet_of
from tuning.pool import ATTEMPTS, Pool, homes

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

    def ready(self) -> int:
        return os.getpid()

    def warm(self, window: str) -> None:
        self.held.append(window)

    def forget(self, windows: list[str]) -> None:
        self.held = [window for window in self.held if window not in windows]

    def score(self, plan: str, window: str) -> dict[str, Any]:
        if plan == "deadly":
            os._exit(1)
        if plan == "wrong":
            return {"error": "this plan is wrong"}
        if plan == "slow":
            time.sleep(1)
        fresh = window not in self.held
        self.held += [window] * fresh
        return {"pid": os.getpid(), "window": window, "prefilled": fresh}


class Hands:
    """A pool with its workers, called without `.remote`."""

    def __init__(self, workers: int, windows: list[str], broken: Path) -> None:
        self.workers = [Worker.remote(str(broken)) for _ in range(workers)]
        held = {window: ray.put(window) for window in windows}
        self.pool = ray.remote(Pool).options(num_cpus=0).remote(self.workers, held, None)
        self.pairs = ray.get(self.pool.assign.remote(windows))
        assert ray.get([self.pool.warm.remote(*pair) for pair in self.pairs]) == [None] * len(self.pairs)

    def pids(self) -> list[int]:
        return ray.get([worker.ready.remote() for worker in self.workers])

    def score(self, *tasks: tuple[str, str]) -> list[dict[str, Any]]:
        return ray.get([self.pool.score.remote(*task) for task in tasks], timeout=120)

    def told(self) -> str:
        return " | ".join(ray.get(self.pool.tell.remote()))


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
    yield
    ray.shutdown()


@pytest.fixture
def hands(tmp_path: Path) -> Iterator[Callable[..., Hands]]:
    made: list[Hands] = []

    def make(workers: int = 2, windows: str = "abcd") -> Hands:
        made.append(Hands(workers, list(windows), tmp_path / "broken"))
        return made[-1]

    yield make
    for each in made:
        for actor in (each.pool, *each.workers):
            ray.kill(actor)


def test_a_window_is_scored_where_it_was_prefilled(hands: Callable[..., Hands]) -> None:
    pool = hands()
    scores = pool.score(*[("plan", window) for window in "abcdabcd"])
    assert [score["window"] for score in scores] == list("abcdabcd")
    assert not any(score["prefilled"] for score in scores)
    assert len({score["pid"] for score in scores if score["window"] in "ac"}) == 1


def test_a_dead_replica_costs_no_score_and_comes_back_with_its_windows(hands: Callable[..., Hands]) -> None:
    pool = hands()
    kill(pool.pids()[0])
    scores = pool.score(*[("slow", window) for window in "abcdabcd"])
    assert [score.get("window") for score in scores] == list("abcdabcd")
    while "replica 1 is back" not in (news := pool.told()):
        assert "stays away" not in news
        time.sleep(0.1)
    scores = pool.score(*[("slow", window) for window in "aabb"])
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
    assert f"{ATTEMPTS} replicas died" in pool.score(("deadly", "a"))[0]["error"]
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


def test_windows_no_longer_wanted_are_freed(hands: Callable[..., Hands]) -> None:
    pool = hands()
    ray.get(pool.pool.assign.remote(["a", "b"]))
    assert pool.score(("plan", "c"))[0]["prefilled"]


@pytest.mark.parametrize(("replicas", "windows"), [(1, 4), (2, 4), (3, 4), (4, 4), (6, 4), (8, 4), (2, 1)])
def test_every_replica_holds_as_many_windows_as_any_other_and_every_window_is_held(replicas: int, windows: int) -> None:
    held = homes(replicas, [str(number) for number in range(windows)])
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
    fleet = fleet_of(nodes, asked)
    assert (fleet.replicas, fleet.threads, fleet.gpu) == (replicas, threads, gpu)


def test_more_replicas_than_fit_are_refused_with_what_there_is() -> None:
    with pytest.raises(UserError, match="--replicas 3 does not fit on 2 CPUs"):
        fleet_of([{"CPU": 2}], 3)
