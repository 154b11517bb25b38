"""Facts about clusters: the search as a job on a real Ray head with a token, and a cluster.yaml that Ray accepts."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from searching import ROOT, SMALL, descendants, kill, lines, make_model, make_texts

from baklava.plan import BudgetPlan

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_the_cluster_file(config: dict[str, Any]) -> None:
    validate_config(prepare_config(config))


def test_every_node_gets_the_token_and_starts_with_it(config: dict[str, Any]) -> None:
    assert "~/.ray/auth_token" in config["file_mounts"]
    for where in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[where] if "ray start" in command]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token" in starts[0]


def test_the_cluster_file_uploads_neither_results_nor_environments(config: dict[str, Any]) -> None:
    assert {".git", ".venv", "runs"} <= set(config["rsync_exclude"])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Head:
    """A head node of its own, with a token of its own, on this machine's loopback address."""

    def __init__(self, root: Path, temp: str) -> None:
        token, self.port, self.dashboard = root / "token", free_port(), free_port()
        token.write_text("b" * 64)
        token.chmod(0o600)
        own = {
            "RAY_AUTH_TOKEN_PATH": str(token),
            "BAKLAVA_DATA": str(root / "data"),
            "BAKLAVA_CACHE": str(root / "cache"),
        }
        self.env = {**os.environ, **own, "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1"}
        self.log = root / "head.log"
        where = [f"--port={self.port}", f"--dashboard-port={self.dashboard}", f"--temp-dir={temp}"]
        only_here = ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
        sizes = ["--num-cpus=2", "--object-store-memory=268435456"]
        command = [RAY, "start", "--head", "--block", *where, *only_here, *sizes]
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=self.env)

    def job(self, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of a script in the checkout; waits for its end."""
        submit = [RAY, "job", "submit", "--address", f"http://127.0.0.1:{self.dashboard}", "--working-dir", str(ROOT)]
        command = [*submit, "--", sys.executable, *map(str, arguments)]
        return subprocess.run(command, env={**self.env, **env}, capture_output=True, text=True, timeout=300)

    def wait(self) -> None:
        """Wait until jobs are taken."""
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            if "Ray runtime started" in self.log.read_text():
                return
            time.sleep(0.2)
        pytest.fail(self.log.read_text())

    def stop(self) -> None:
        for pid in [pid for pid, _ in descendants(self.process.pid)] + [self.process.pid]:
            kill(pid)
        self.process.wait()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    # Ray's sockets lie in its folder, and their paths may have 107 characters only.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as temp:
        head = Head(tmp_path_factory.mktemp("head"), temp)
        try:
            head.wait()
            yield head
        finally:
            head.stop()


@pytest.mark.ray
def test_a_search_runs_as_a_job_of_a_cluster(head: Head, tmp_path: Path) -> None:
    out, summary = tmp_path / "run", tmp_path / "run.json"
    named = ["--model", make_model(tmp_path / "model"), "--texts", make_texts(tmp_path / "texts")]
    where = ["--out", out, "--json", summary]
    ended = head.job("jobs/search.py", *named, *SMALL, "--trials", 3, "--replicas", 1, *where)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "connecting to" in ended.stdout
    assert "trial 3 of 3" in ended.stdout
    assert BudgetPlan.read(out / "plan.json").ratio <= 0.5
    assert lines(out / "trials.jsonl") == json.loads(summary.read_text())["trials"]["finished"] == 3


@pytest.mark.ray
def test_a_job_that_fails_says_so_to_who_submitted_it(head: Head, tmp_path: Path) -> None:
    ended = head.job("jobs/search.py", "--model", "nobody/has-this", "--out", tmp_path / "none")
    assert ended.returncode != 0
    assert "nobody/has-this" in ended.stdout + ended.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.ray
def test_a_job_without_the_token_is_turned_away(head: Head, tmp_path: Path) -> None:
    other = tmp_path / "token"
    other.write_text("c" * 64)
    ended = head.job("jobs/search.py", "--help", RAY_AUTH_TOKEN_PATH=str(other))
    assert ended.returncode != 0
    assert "usage: search.py" not in ended.stdout
