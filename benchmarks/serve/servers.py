"""Sizes of the serving benchmark, and its servers: ours under a plan or with the full cache, and the peers."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import psutil

from baklava.console import log
from baklava.data.demo_assets import demo_model
from baklava.errors import UserError
from baklava.paths import cache_dir
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
        openvino_kept_tokens: tokens of a sequence that OpenVINO GenAI's cache eviction keeps, in blocks of 32; 512 of
            4,096 + 64 are 12.3 %.
        document_tokens: tokens of each document of the loads that share prefixes.
        documents: documents, about each of which `questions` are asked.
        chats: chats about documents of their own, of `turns` turns.
        clients: clients of these loads.
        answer_tokens: generated per question or turn.
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
    openvino_kept_tokens: int = 512
    document_tokens: int = 3072
    documents: int = 4
    questions: int = 4
    chats: int = 4
    turns: int = 3
    clients: int = 2
    answer_tokens: int = 16


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
        openvino_kept_tokens=128,
        document_tokens=300,
        documents=2,
        questions=2,
        chats=2,
        turns=2,
        answer_tokens=4,
    )


ROOT = Path(__file__).parents[2]
SERVE_SCRIPT = ROOT / "jobs/serve.py"
OPENVINO_ENVIRONMENT = ROOT / "benchmarks/openvino/.venv"
SPARE_TOKENS = 64
"""Room in OpenVINO's pool for prompts that have a few tokens more than asked for."""
STARTUP_TIMEOUT_SECONDS = 300.0
SHUTDOWN_TIMEOUT_SECONDS = 90.0

PLAN, FULL = "baklava, 12.5 % plan", "baklava, full plan"
STREAMS_RATIO = "0.5"
PLAN_STREAMS = f"{PLAN}, --prefill-decode-ratio {STREAMS_RATIO}"
OURS = (PLAN, PLAN_STREAMS, FULL)
TRANSFORMERS = "transformers serve"
TRANSFORMERS_BATCHING = "transformers serve --continuous-batching"
OPENVINO, OPENVINO_EVICTION = "OpenVINO GenAI", "OpenVINO GenAI, cache eviction"
PEERS = (TRANSFORMERS, TRANSFORMERS_BATCHING, OPENVINO, OPENVINO_EVICTION)


@dataclass(frozen=True)
class RunningServer:
    """A server's address, its name for the model, its process, and its log."""

    address: str
    model: str
    process: psutil.Process
    log_file: IO[bytes]

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

    @property
    def has_ended(self) -> bool:
        """Whether its process has ended by itself."""
        return self.process.status() == psutil.STATUS_ZOMBIE  # until its parent, which we are, waits for it


@contextmanager
def running_server(
    name: str, config: ServeBenchmarkConfig, pinned_prefix: str = "", options: Sequence[str] = ()
) -> Iterator[RunningServer]:
    """Run one of the servers until the block ends; only ours takes a `pinned_prefix` and more `options`.

    Raises:
        UserError: the server is not installed or did not start; the message has the last lines of its log.
    """
    port = _free_port()
    model = str(demo_model()) if name in PEERS and config.model == DEMO else config.model
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(config.threads)}
    if name in (OPENVINO, OPENVINO_EVICTION):
        environment |= {"PYTHONPATH": str(ROOT)}  # its environment has no baklava
    with tempfile.TemporaryFile() as server_log, tempfile.TemporaryDirectory() as folder:
        command = [*server_command(name, model, config, port), *options]
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
            yield RunningServer(address, model, psutil.Process(process.pid), server_log)
        finally:
            _stop(process)


def server_command(name: str, model: str, config: ServeBenchmarkConfig, port: int) -> list[str]:
    """Return the command of a server.

    Raises:
        UserError: OpenVINO GenAI is not installed, or cannot read the model.
    """
    dtype = config.dtype or "float32"
    if name in (TRANSFORMERS, TRANSFORMERS_BATCHING):
        return _transformers_command(name, model, dtype, port)
    if name in (OPENVINO, OPENVINO_EVICTION):
        if not (OPENVINO_ENVIRONMENT / "ready").is_file():
            raise UserError("it is not installed in benchmarks/openvino/.venv; run `make peers`")
        return _openvino_command(name, _export_for_openvino(Path(model).absolute()), config, dtype, port)
    return _our_command(config, name, dtype, port)


def _our_command(config: ServeBenchmarkConfig, name: str, dtype: str, port: int) -> list[str]:
    plan = "full" if name == FULL else config.plan
    options = ["--plan", plan, "--model", config.model, "--port", str(port), "--pool", str(config.load_pool_bytes)]
    options += ["--dtype", dtype]
    if name != FULL and config.prefill_chunk:
        options += ["--prefill-chunk", str(config.prefill_chunk)]
    if name == PLAN_STREAMS:
        options += ["--prefill-decode-ratio", STREAMS_RATIO]
    return [sys.executable, str(SERVE_SCRIPT), *options, "--max-waiting", "256", "--timeout", "3600"]


def _transformers_command(name: str, model: str, dtype: str, port: int) -> list[str]:
    _, verb, *options = name.split()
    command = [str(Path(sys.executable).with_name("transformers")), verb, model, *options, "--device", "cpu"]
    return [*command, "--dtype", dtype, "--host", "127.0.0.1", "--port", str(port)]


def _openvino_command(name: str, exported: Path, config: ServeBenchmarkConfig, dtype: str, port: int) -> list[str]:
    max_tokens = config.prompt_tokens + config.output_tokens + SPARE_TOKENS
    options = ["--model", str(exported), "--port", str(port), "--dtype", dtype, "--threads", str(config.threads)]
    options += ["--sequences", str(config.concurrency), "--max-tokens", str(max_tokens)]
    if name == OPENVINO_EVICTION:
        options += ["--kept-tokens", str(config.openvino_kept_tokens)]
    return [str(OPENVINO_ENVIRONMENT / "bin/python"), "-m", "benchmarks.openvino.server", *options]


def _export_for_openvino(model: Path) -> Path:
    """Return the folder of a model in OpenVINO's format, after exporting it (a minute) if the cache has it not yet."""
    if not (model / "config.json").is_file():
        raise UserError(f"{model} is not the folder of a model, and the export reads nothing else; give a folder")
    files = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in sorted(model.iterdir())]
    key = json.dumps([files, (OPENVINO_ENVIRONMENT.parent / "requirements.txt").read_text()])
    target = cache_dir() / "openvino" / f"{model.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not target.is_dir():
        log(f"exporting {model.name} to {target}")
        python = OPENVINO_ENVIRONMENT / "bin/python"
        command = [str(python), "-m", "benchmarks.openvino.export", str(model), str(target)]
        with tempfile.TemporaryFile() as export_log:
            ended = subprocess.run(command, cwd=ROOT, stdout=export_log, stderr=export_log, check=False)
            if ended.returncode:
                raise UserError(f"the model was not exported: {last_lines(export_log)}")
    return target


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
    raise UserError(f"the server did not start: {last_lines(server_log)}")


def last_lines(log_file: IO[bytes]) -> str:
    """Return the last three lines of a log as one."""
    log_file.seek(0)
    lines = [line for line in log_file.read().decode(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:]) or "it logged nothing"


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop a server with SIGTERM; kill its whole process group if that takes too long."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(SHUTDOWN_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
