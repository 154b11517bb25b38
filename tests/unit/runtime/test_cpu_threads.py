"""Facts about the threads of PyTorch: their number, and how they wait for each other."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from baklava.runtime import cpu_threads, ray_session
from baklava.runtime.cpu_threads import WAIT_POLICY, available_cpus, cap_threads, configure_threads, max_threads

ROOT = Path(__file__).resolve().parents[3]
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

STOP_BEFORE_TORCH = """
import importlib, json, os, runpy, sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(json.dumps({name: os.environ[name] for name in %r if name in os.environ}))
            sys.stdout.flush()
            os._exit(0)
sys.meta_path.insert(0, Stop())
sys.argv = %r
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the user's and no quota."""
    for name in (*VARIABLES, ray_session.JOB_CONFIG_VARIABLE):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(cpu_threads, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def seen_before_torch(*command: str, env: Mapping[str, str]) -> dict[str, str]:
    """The variables of OpenMP at the moment when a command imports torch."""
    code = STOP_BEFORE_TORCH % (VARIABLES, list(command))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "command",
    [
        ("jobs/search.py", "--model", "demo"),
        ("jobs/evaluate.py", "--plan", "full"),
        ("jobs/serve.py", "--model", "demo", "--plan", "full"),
        ("jobs/benchmark.py", "decode"),
    ],
)
def test_a_command_chooses_how_threads_wait_before_torch_is_imported(command: tuple[str, ...], tmp_path: Path) -> None:
    env = {"BAKLAVA_DATA": str(tmp_path)}
    seen = seen_before_torch(str(ROOT / command[0]), *command[1:], env=env)
    assert {name: seen.get(name) for name in WAIT_POLICY} == WAIT_POLICY


@pytest.mark.parametrize("own", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "200"}])
def test_the_users_own_way_to_wait_stays_as_it_is(own: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    configure_threads()
    assert {name: os.environ[name] for name in VARIABLES if name in os.environ} == own


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "350000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "1600000 100000"}, 8),
        ({"a.slice/b.service/cpu.max": "400000 100000", "a.slice/cpu.max": "200000 100000"}, 2),
        ({"other/cpu.max": "200000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
    ],
)
def test_cores_are_those_of_the_affinity_within_the_quotas_of_all_cgroups(
    files: dict[str, str], cpus: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    own = tmp_path / "own"
    own.write_text("3:cpuset:/\n0::/a.slice/b.service\n")
    monkeypatch.setattr(cpu_threads, "OWN_CGROUPS", own)
    assert available_cpus() == cpus


@pytest.mark.parametrize(
    ("quota", "own", "threads"),
    [("max", None, None), ("300000", None, "3"), ("300000", "5", "5"), ("1600000", None, None)],
)
def test_a_quota_below_the_cores_sets_the_number_of_threads_unless_the_user_has(
    quota: str, own: str | None, threads: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    configure_threads()
    assert os.environ.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize(
    ("value", "threads"), [("", 4), ("2", 2), ("3,1", 3), ("16", 4), ("0", 4), ("many", 4), (" 1 ", 1)]
)
def test_the_users_number_of_threads_caps_that_of_a_replica(
    value: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert cap_threads(4) == threads


@pytest.mark.parametrize(
    ("nodes", "replicas", "threads"),
    [
        ([(8, 8)], 1, 8),
        ([(8, 8)], 3, 2),
        ([(2, 2)], 3, 0),
        ([(8, 8), (4, 4)], 2, 4),
        ([(32, 1), (8, 2)], 3, 4),  # a node may take fewer replicas than it has cores
        ([], 1, 0),
        ([(8, 8)], 0, 0),
    ],
)
def test_the_threads_of_all_replicas_fit_on_the_cores(
    nodes: list[tuple[int, int]], replicas: int, threads: int
) -> None:
    assert max_threads(nodes, replicas) == threads


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (None, "1"),
        ({"metadata": {}, "runtime_env": {}}, None),
        ({"metadata": {}, "runtime_env": {"env_vars": {"A": "b"}}}, None),
        ({"metadata": {}, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}, "1"),
    ],
)
def test_the_driver_of_a_job_is_not_left_with_the_one_thread_that_ray_gives_it(
    config: dict[str, object] | None, kept: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if config is not None:
        monkeypatch.setenv(ray_session.JOB_CONFIG_VARIABLE, json.dumps(config))
    ray_session.configure_ray_environment()
    assert os.environ.get("OMP_NUM_THREADS") == kept


def test_a_call_on_an_ending_thread_returns_or_raises() -> None:
    thread = cpu_threads.run_on_ending_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()
    with pytest.raises(ZeroDivisionError):
        cpu_threads.run_on_ending_thread(lambda: 1 / 0)
