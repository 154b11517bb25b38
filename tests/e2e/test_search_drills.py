"""Drills: real searches on real clusters that lose a node, their driver, the tracking server or the disk, or are
interrupted. Trials are counted before and after: none is lost, none is doubled. `make drill` runs them."""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow_server import MlflowServer
from ray_head import RAY, Head, Loopback
from search_process import (
    SMALL_SEARCH_OPTIONS,
    count_lines,
    descendants,
    kill,
    make_model,
    make_texts,
    start_search,
    wait_until,
)

from baklava.plan.budget_plan import BudgetPlan
from tuning.study.journal import Journal
from tuning.study.settings import SearchRecord
from tuning.study.trial import TRIALS_FILE, TrialRecord

pytestmark = [pytest.mark.drill, pytest.mark.ray]

TRIALS = 12


@dataclass(frozen=True)
class Ground:
    """Where a drill takes place."""

    root: Path

    @property
    def arguments(self) -> list[object]:
        """The arguments of a search."""
        named = ["--model", self.root / "model", "--texts", self.root / "texts"]
        return [*named, *SMALL_SEARCH_OPTIONS, "--trials", TRIALS, "--budget", 0.5, "--out", self.out]

    @property
    def out(self) -> Path:
        return self.root / "disk/run"

    @property
    def log(self) -> Path:
        return self.root / "search.log"

    def trials(self) -> list[str]:
        """Whole lines of the journal."""
        text = (self.out / TRIALS_FILE).read_text() if (self.out / TRIALS_FILE).exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()


@pytest.fixture
def ground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ground:
    make_model(tmp_path / "model")
    make_texts(tmp_path / "texts")
    (tmp_path / "disk").mkdir()
    monkeypatch.setenv("BAKLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BAKLAVA_DATA", str(tmp_path / "data"))
    return Ground(tmp_path)


def end(process: subprocess.Popen[bytes], ground: Ground, code: int = 0) -> None:
    assert process.wait(timeout=500) == code, ground.log.read_text()


def check_whole(ground: Ground, before: list[str], uri: str | None = None) -> None:
    """Every trial is there once, in the journal and in MLflow, those from before as they were, and there is a plan."""
    assert ground.trials()[: len(before)] == before
    records = Journal.read(ground.out / TRIALS_FILE, TrialRecord.model_validate_json)
    assert [record.trial for record in records] == list(range(1, TRIALS + 1))
    assert {record.status for record in records} <= {"finished", "pruned"}
    assert len({json.dumps(record.params, sort_keys=True) for record in records}) == TRIALS
    assert BudgetPlan.read(ground.out / "plan.json").ratio <= 0.5
    client = MlflowClient(tracking_uri=uri or f"sqlite:///{ground.root / 'data/mlflow.db'}")
    parent = client.get_run(SearchRecord.read(ground.out).run)
    children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    recorded = Counter(
        int(child.data.tags["baklava.trial"]) for child in children if "baklava.trial" in child.data.tags
    )
    assert recorded == Counter(range(1, TRIALS + 1))
    assert {child.info.status for child in children} == {"FINISHED"}


class Cluster:
    """A head with two CPUs and a second node with one: two raylets with their own folders, on loopback addresses."""

    def __init__(self, root: Path, temp: Path) -> None:
        self.root, self.temp, self.log = root, temp, root / "worker.log"
        self.network = Loopback()
        self.head = Head(root, str(temp / "head"), self.network)
        self.node: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Wait for the head, then for the node."""
        self.head.wait()
        where = [
            f"--address=127.0.0.1:{self.head.port}",
            "--node-ip-address=127.0.0.2",
            f"--temp-dir={self.temp / 'node'}",
        ]
        sizes = ["--num-cpus=1", "--object-store-memory=134217728"]
        command = [*self.network.prefix, RAY, "start", "--block", *where, *sizes]
        with self.log.open("wb") as file:
            self.node = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=self.head.env)
        wait_until(lambda: "Ray runtime started" in self.log.read_text(), self.node, self.log)

    @property
    def env(self) -> dict[str, str]:
        """What a driver on the head's machine has in its environment."""
        return {**self.head.env, "RAY_ADDRESS": f"127.0.0.1:{self.head.port}"}

    def replicas(self) -> tuple[int, int]:
        """Replicas on the head and on the node."""
        return len(self._replicas(self.head.process.pid)), len(self._replicas(self.node.pid))

    def lose_the_node(self) -> None:
        """kill -9 of all its processes, the raylet first."""
        below = list(descendants(self.node.pid))
        for pid, _ in sorted(below, key=lambda each: "raylet/raylet" not in each[1]):
            kill(pid)
        kill(self.node.pid)
        self.node.wait()

    def stop(self) -> None:
        if self.node and self.node.poll() is None:
            self.lose_the_node()
        self.head.stop()
        self.network.stop()

    def _replicas(self, pid: int) -> list[int]:
        return [child for child, title in descendants(pid) if title.startswith("ray::ScoringWorker")]


@pytest.fixture
def cluster(ground: Ground) -> Iterator[Cluster]:
    # Ray's sockets lie in its folders, and their paths may have 107 characters only.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as temp:
        cluster = Cluster(ground.root, Path(temp))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def test_a_node_that_dies_takes_no_trial_along(ground: Ground, cluster: Cluster) -> None:
    search = start_search(
        *ground.arguments, "--replicas", 2, log=ground.log, env=cluster.env, prefix=cluster.network.prefix
    )
    wait_until(lambda: len(ground.trials()) >= 2, search, ground.log)
    assert cluster.replicas() == (1, 1)
    before = ground.trials()
    cluster.lose_the_node()
    end(search, ground)
    check_whole(ground, before)
    assert "died; its work goes to the others" in ground.log.read_text()


def test_a_killed_driver_leaves_a_cluster_on_which_the_search_goes_on(ground: Ground, cluster: Cluster) -> None:
    search = start_search(
        *ground.arguments, "--replicas", 2, log=ground.log, env=cluster.env, prefix=cluster.network.prefix
    )
    wait_until(lambda: len(ground.trials()) >= 3, search, ground.log)
    kill(search.pid)
    search.wait()
    before = ground.trials()
    again = start_search("--resume", ground.out, log=ground.log, env=cluster.env, prefix=cluster.network.prefix)
    end(again, ground)
    check_whole(ground, before)


def test_a_tracking_server_that_dies_and_comes_back_has_every_trial_once(ground: Ground) -> None:
    server = MlflowServer(ground.root)
    try:
        search = start_search(
            *ground.arguments, "--replicas", 1, log=ground.log, env={"MLFLOW_TRACKING_URI": server.uri}
        )
        wait_until(lambda: len(ground.trials()) >= 2, search, ground.log)
        server.stop()
        wait_until(lambda: "mlflow: cannot write" in ground.log.read_text(), search, ground.log)
        before = ground.trials()
        os.kill(search.pid, signal.SIGSTOP)  # so that the server is surely back before the search has ended
        server.start()
        os.kill(search.pid, signal.SIGCONT)
        end(search, ground)
        check_whole(ground, before, server.uri)
        assert "mlflow: the server is back" in ground.log.read_text()
    finally:
        server.stop()


def mount(folder: Path, *options: str) -> bool:
    """A file system in memory; whether this may be done here."""
    return subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], capture_output=True).returncode == 0


def test_a_full_disk_is_said_in_a_sentence_and_the_search_goes_on_once_there_is_room(ground: Ground) -> None:
    disk = ground.out.parent
    if not mount(disk, "-o", "size=64k"):
        pytest.skip("no file system may be mounted here")
    try:
        search = start_search(*ground.arguments, "--replicas", 1, log=ground.log)
        wait_until(lambda: len(ground.trials()) >= 2, search, ground.log)
        (disk / "filler").write_bytes(b"x" * 4096)
        while len(list(disk.glob("filler*"))) < 64 and fill(disk):
            pass
        end(search, ground, code=2)
        said = ground.log.read_text()
        assert "No space left on device" in said.splitlines()[-1]
        assert f"baklava-search --resume {ground.out}" in said
        assert "Traceback" not in said
        before = ground.trials()
        assert 2 <= len(before) < TRIALS
        assert mount(disk, "-o", "remount,size=16m")
        again = start_search("--resume", ground.out, log=ground.log)
        end(again, ground)
        check_whole(ground, before)
    finally:
        subprocess.run(["umount", "-l", disk], check=False)


def fill(disk: Path) -> bool:
    """Write one more page; whether there was room."""
    try:
        (disk / f"filler{time.monotonic_ns()}").write_bytes(b"x" * 4096)
    except OSError:
        return False
    return True


def test_ctrl_c_twice_stops_at_once_and_what_was_recorded_stays(ground: Ground) -> None:
    search = start_search(*ground.arguments, "--trials", 400, "--replicas", 1, log=ground.log)
    wait_until(lambda: len(ground.trials()) >= 2, search, ground.log)
    before = ground.trials()
    for _ in range(2):
        os.kill(search.pid, signal.SIGINT)
        time.sleep(0.3)
    assert search.wait(timeout=60) == 130
    assert "Ctrl-C again stops now" in ground.log.read_text()
    assert "Traceback" not in ground.log.read_text()
    assert ground.trials()[: len(before)] == before
    assert count_lines(ground.out / TRIALS_FILE) == len(ground.trials())
