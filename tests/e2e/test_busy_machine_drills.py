"""Drills beside other work: as many busy processes as there are cores leave a search and a server half of the machine.

Threads that wait in a loop for one that has lost its core would take ten times as long.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from search_process import ROOT, make_model, make_texts, start_search
from server_process import Running, asking, serving

pytestmark = [pytest.mark.drill, pytest.mark.ray]

MAX_SLOWDOWN = 2.5
"""Half of the cores take twice the time; the rest is noise."""

# A fifth of the demo model's layers, in their shape: PyTorch spreads their products over several threads.
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "head_dim": 64}
HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3}

OPTIONS = ["--context", 320, "--continuation", 64, "--bits", 16, "--budget", 0.5, "--trials", 4, "--replicas", 1]
PROMPTS = [f"Chapter {number}. " + "It was a bright cold day in April. " * 60 for number in range(8)]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a user would have to set."""
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


@contextmanager
def busy_cores() -> Iterator[None]:
    """A busy process for each core."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def check(what: str, quiet: float, busy: float) -> None:
    print(f"\n{what}: {quiet:.1f} s on a quiet machine, {busy:.1f} s beside {len(os.sched_getaffinity(0))} processes")
    assert busy < MAX_SLOWDOWN * quiet


def test_a_search_beside_busy_processes_takes_the_time_that_they_leave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model", **SHAPE, **HEADS)
    texts = make_texts(tmp_path / "texts", words=1000)
    monkeypatch.setenv("BAKLAVA_DATA", str(tmp_path / "data"))

    def seconds(name: str) -> float:
        """The time of a search that has to profile the model."""
        monkeypatch.setenv("BAKLAVA_CACHE", str(tmp_path / f"cache-{name}"))
        log, out = tmp_path / f"{name}.log", tmp_path / name
        started = time.monotonic()
        search = start_search(
            *("--model", model, "--texts", texts, *OPTIONS, "--out", out),
            log=log,
            prefix=["env", "-u", "OMP_NUM_THREADS"],
        )
        assert search.wait(timeout=400) == 0, log.read_text()
        return time.monotonic() - started

    quiet = seconds("quiet")
    with busy_cores():
        busy = seconds("busy")
    check("search", quiet, busy)


def test_a_server_beside_busy_processes_takes_the_time_that_they_leave_it(tmp_path: Path) -> None:
    def seconds(server: Running) -> float:
        """The time of several requests at once."""

        async def ask() -> list[int]:
            async with asking(server) as client:
                bodies = [{"prompt": prompt, "max_tokens": 48, "ignore_eos": True} for prompt in PROMPTS]
                answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
                return [answer.status_code for answer in answers]

        started = time.monotonic()
        assert asyncio.run(ask()) == [200] * len(PROMPTS)
        return time.monotonic() - started

    with serving("--model", "demo", "--plan", ROOT / "plans/demo-12.5.json", folder=tmp_path) as server:
        seconds(server)  # the first requests are slower
        quiet = seconds(server)
        with busy_cores():
            busy = seconds(server)
    check("server", quiet, busy)
