"""Servers as people start them: ours inside a plan or with the full cache, and transformers' own."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import psutil

from baklava.data.demo_assets import demo_model
from baklava.errors import UserError
from baklava.runtime.model_loader import DEMO
from benchmarks.serve.config import Asked

JOB = Path(__file__).parents[2] / "jobs/serve.py"
UP = 300.0
"""Seconds that a server may take to come up."""

PLAN, FULL = "ours, 12.5 % plan", "ours, full plan"
PEER, BATCHED = "transformers serve", "transformers serve --continuous-batching"
PEERS = (PEER, BATCHED)


@dataclass(frozen=True)
class Server:
    """Where a server answers, under which name it has the model, and its process."""

    address: str
    model: str
    process: psutil.Process

    @property
    def resident(self) -> int:
        """Bytes of memory of all its processes; pages that they share are counted once for each."""
        found = 0
        for process in (self.process, *self.process.children(recursive=True)):
            try:
                found += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return found


@contextmanager
def server(name: str, asked: Asked, prefix: str = "") -> Iterator[Server]:
    """One of the contestants, for as long as the block lasts; `prefix` is a prompt that is declared to ours.

    Raises:
        UserError: it did not come up; with the last that it said.
    """
    port = _free_port()
    model = _directory(asked.model) if name in PEERS else asked.model
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(asked.threads)}
    with tempfile.TemporaryFile() as said, tempfile.TemporaryDirectory() as folder:
        command = _peer(name, model, port) if name in PEERS else _ours(asked, name, port)
        if prefix:
            path = Path(folder, "prefix.json")
            path.write_text(json.dumps({"text": prefix}))
            command += ["--pinned-prefix", str(path)]
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(address, process, said)
            yield Server(address, model, psutil.Process(process.pid))
        finally:
            _end(process)


def _ours(asked: Asked, name: str, port: int) -> list[str]:
    plan = asked.plan if name == PLAN else "full"
    options = ["--plan", plan, "--model", asked.model, "--port", str(port), "--pool", str(asked.roomy)]
    return [sys.executable, str(JOB), *options, "--max-waiting", "256", "--timeout", "3600"]


def _peer(name: str, model: str, port: int) -> list[str]:
    _, verb, *batching = name.split()
    command = [str(Path(sys.executable).with_name("transformers")), verb, model, *batching, "--device", "cpu"]
    return [*command, "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]


def _directory(model: str) -> str:
    return str(demo_model()) if model == DEMO else model


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _wait(address: str, process: "subprocess.Popen[bytes]", said: IO[bytes]) -> None:
    deadline = time.monotonic() + UP
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    said.seek(0)
    last = said.read().decode(errors="replace").strip().splitlines()[-3:]
    raise UserError(f"the server did not come up: {' / '.join(last) or 'it said nothing'}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """As Ctrl-C does; then its whole group."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(90)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
