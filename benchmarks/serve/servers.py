"""Sizes of the serving benchmark, and its servers: ours under a plan or with the full cache, and transformers' own."""

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


@dataclass(frozen=True)
class ServeBenchmarkConfig:
    """What is served, and under which load.

    Attributes:
        other_plans: plans of the same size, of which only a decode step is timed.
        prompt_tokens: tokens of a prompt, except in the open loop.
        prompt_token_range: shortest and longest prompt of the open loop.
        output_tokens: generated per request.
        concurrency: clients of the closed loop; each sends its next request when the last one is answered.
        closed_loop_requests: requests of a closed loop.
        closed_loop_seconds: after which a closed loop ends, finished or not.
        open_loop_requests: requests of an open loop, which come at random times.
        open_loop_rates: requests per second of open loops, as multiples of what the plan served in the closed loop.
        pool_bytes: KV pool into which as many sequences as possible are packed.
        load_pool_bytes: KV pool of servers under load, in which all clients' sequences run together even with the
            full cache, together with a pinned prefix.
        contexts: sequence lengths for the capacity of the pool.
        batch_size: sequences that decode together in the engine's timed steps.
        decode_steps: timed steps of the engine.
        long_prompt_tokens: tokens of the prompt that is prefilled alongside a decoding sequence.
        max_ttft: seconds to the first token that a request may take to count towards goodput.
        max_tpot: seconds per token after the first that it may take.
        threads: torch's threads in each server.
        dtype: precision of the model's products in each server, as in `load`.
        prefill_chunk: tokens of a chunk of a prompt under the plan; as the plan says if None.
    """

    model: str = "demo"
    plan: str = "plans/demo-12.5-16bit.json"
    texts: str = "botocore"
    other_plans: tuple[str, ...] = ("plans/demo-12.5.json",)
    prompt_tokens: int = 4096
    prompt_token_range: tuple[int, int] = (2048, 6144)
    output_tokens: int = 64
    concurrency: int = 8
    closed_loop_requests: int = 8
    closed_loop_seconds: float = 360.0
    open_loop_requests: int = 8
    open_loop_rates: tuple[float, ...] = (0.8,)
    pool_bytes: int = 640 << 20
    load_pool_bytes: int = 1200 << 20
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192)
    batch_size: int = 8
    decode_steps: int = 64
    long_prompt_tokens: int = 6144
    max_ttft: float = 60.0
    max_tpot: float = 1.0
    seed: int = 0
    threads: int = 2
    dtype: str | None = None
    prefill_chunk: int | None = None


def quick_config(
    model: str = "demo", plan: str = ServeBenchmarkConfig.plan, texts: str = "botocore"
) -> ServeBenchmarkConfig:
    """Return sizes that show that the benchmark runs; their results mean nothing."""
    return ServeBenchmarkConfig(
        model,
        plan,
        texts,
        other_plans=(),
        prompt_tokens=256,
        prompt_token_range=(128, 384),
        output_tokens=8,
        concurrency=2,
        closed_loop_requests=4,
        open_loop_requests=4,
        open_loop_rates=(0.5,),
        pool_bytes=256 << 20,
        load_pool_bytes=256 << 20,
        contexts=(1024, 2048),
        batch_size=2,
        decode_steps=6,
        long_prompt_tokens=512,
    )


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
        command = (
            _transformers_command(name, model, config.dtype or "float32", port)
            if name in PEERS
            else _our_command(config, name, port)
        )
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
    options += ["--dtype", config.dtype or "float32"]
    if name == PLAN and config.prefill_chunk:
        options += ["--prefill-chunk", str(config.prefill_chunk)]
    return [sys.executable, str(SERVE_SCRIPT), *options, "--max-waiting", "256", "--timeout", "3600"]


def _transformers_command(name: str, model: str, dtype: str, port: int) -> list[str]:
    _, verb, *options = name.split()
    command = [str(Path(sys.executable).with_name("transformers")), verb, model, *options, "--device", "cpu"]
    return [*command, "--dtype", dtype, "--host", "127.0.0.1", "--port", str(port)]


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
