"""Start servers as users do: ours under a plan or with the full cache, and transformers' own."""

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
from benchmarks.serve.config import ServeBenchmarkConfig

SERVE_SCRIPT = Path(__file__).parents[2] / "jobs/serve.py"
STARTUP_TIMEOUT_SECONDS = 300.0
SHUTDOWN_TIMEOUT_SECONDS = 90.0

PLAN, FULL = "baklava, 12.5 % plan", "baklava, full plan"
TRANSFORMERS = "transformers serve"
TRANSFORMERS_BATCHING = "transformers serve --continuous-batching"
PEERS = (TRANSFORMERS, TRANSFORMERS_BATCHING)


@dataclass(frozen=True)
class RunningServer:
    """A server's address, its name for the model, and its process."""

    address: str
    model: str
    process: psutil.Process

    @property
    def rss_bytes(self) -> int:
        """Resident memory of all its processes; a shared page counts once for each process."""
        total = 0
        for process in (self.process, *self.process.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total


@contextmanager
def running_server(name: str, config: ServeBenchmarkConfig, pinned_prefix: str = "") -> Iterator[RunningServer]:
    """Run one of the servers until the block ends; only ours takes a `pinned_prefix`.

    Raises:
        UserError: the server did not start; the message has the last lines of its log.
    """
    port = _free_port()
    model = str(demo_model()) if name in PEERS and config.model == DEMO else config.model
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(config.threads)}
    with tempfile.TemporaryFile() as server_log, tempfile.TemporaryDirectory() as folder:
        command = _transformers_command(name, model, port) if name in PEERS else _our_command(config, name, port)
        if pinned_prefix:
            prefix_file = Path(folder, "prefix.json")
            prefix_file.write_text(json.dumps({"text": pinned_prefix}))
            command += ["--pinned-prefix", str(prefix_file)]
        process = subprocess.Popen(
            command, stdout=server_log, stderr=server_log, env=environment, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_ready(address, process, server_log)
            yield RunningServer(address, model, psutil.Process(process.pid))
        finally:
            _stop(process)


def _our_command(config: ServeBenchmarkConfig, name: str, port: int) -> list[str]:
    plan = config.plan if name == PLAN else "full"
    options = ["--plan", plan, "--model", config.model, "--port", str(port), "--pool", str(config.load_pool_bytes)]
    return [sys.executable, str(SERVE_SCRIPT), *options, "--max-waiting", "256", "--timeout", "3600"]


def _transformers_command(name: str, model: str, port: int) -> list[str]:
    _, verb, *options = name.split()
    command = [str(Path(sys.executable).with_name("transformers")), verb, model, *options, "--device", "cpu"]
    return [*command, "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_until_ready(address: str, process: "subprocess.Popen[bytes]", server_log: IO[bytes]) -> None:
    deadline = time.monotonic() + STARTUP_TIMEOUT_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    server_log.seek(0)
    last_lines = server_log.read().decode(errors="replace").strip().splitlines()[-3:]
    raise UserError(f"the server did not start: {' / '.join(last_lines) or 'it logged nothing'}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop a server with SIGTERM; kill its whole process group if that takes too long."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(SHUTDOWN_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
