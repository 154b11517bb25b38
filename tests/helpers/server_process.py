"""jobs/serve.py as a process, with a small model of its own, and clients that ask it for much at once."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from byte_model import byte_tokenizer
from plan_factory import make_plan
from transformers import LlamaConfig, LlamaForCausalLM

from baklava.eviction import HeavyHitter
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import load

ROOT = Path(__file__).parents[2]
PATIENCE = 120  # seconds; a busy machine is slow, not broken


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / "serve.py"), *map(str, arguments)]


@dataclass
class Running:
    """A server that listens: its process, its address, and what it said of itself."""

    process: subprocess.Popen[str]
    base: str
    welcome: str
    errors: Path
    key: str = ""
    headers: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.base + path, headers=self.headers | headers, timeout=PATIENCE)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.base + path, json=body, headers=self.headers, timeout=PATIENCE)

    def states(self) -> dict[str, dict[str, Any]]:
        """What every replica does now."""
        return self.get("/v1/plan").json()["replicas"]

    def idle(self) -> bool:
        """Whether no replica works on anything."""
        return not any(state["running"] or state["waiting"] for state in self.states().values())


@contextmanager
def serving(*arguments: object, folder: Path, key: str = "", env: dict[str, str] | None = None) -> Iterator[Running]:
    """The server for as long as the block lasts; what it writes to stderr is in `folder`."""
    port, errors = free_port(), folder / "stderr"
    # A shell that runs the tests in the background has them ignore Ctrl-C, and they would hand that down.
    attentive = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with tempfile.TemporaryDirectory(prefix="r") as ray, errors.open("w") as file:  # Ray's sockets need short names
        process = subprocess.Popen(
            command(*arguments, "--port", port),
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env={**os.environ, "RAY_TMPDIR": ray, **(env or {})},
            preexec_fn=attentive,
            start_new_session=True,  # a group of its own, which a test may signal as `timeout` and a terminal do
        )
        try:
            welcome = welcome_of(process)
            assert "listens on" in welcome, errors.read_text()
            yield Running(process, f"http://127.0.0.1:{port}", welcome, errors, key)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            process.stdout.close()


def welcome_of(process: subprocess.Popen[str]) -> str:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("  -d"):
            break
    return "".join(lines)


def until(happened: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"it did not happen in {seconds} s"
        time.sleep(0.1)


def small_model(folder: Path) -> Path:
    """A random Llama whose tokens are bytes, of 4 layers x 2 KV heads and 4,096 tokens of context."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    config = LlamaConfig(vocab_size=257, bos_token_id=None, eos_token_id=256, initializer_range=0.25, **shape, **heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def small_plan(model: Path, tokens: int = 128) -> BudgetPlan:
    """A plan of uneven budgets, so that long requests soon outgrow it."""
    loaded = load(str(model))
    budgets = [[tokens, tokens // 2], [tokens // 2, tokens]] * (loaded.geometry.layers // 2)
    return make_plan(loaded, budgets, HeavyHitter(eviction_interval=8, distance=0), context_length=1024)


async def stream(client: httpx.AsyncClient, body: dict[str, Any], stop_after: int | None = None) -> list[str]:
    """Data lines of a streamed completion, or as many of them as the client stays for."""
    lines: list[str] = []
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line:
                lines.append(line)
            if stop_after is not None and len(lines) >= stop_after:
                break
    return lines


def whole(lines: list[str]) -> bool:
    """Whether a stream ended as it should."""
    return len(lines) > 1 and lines[-1] == "data: [DONE]" and '"error"' not in lines[-2]


def asking(server: Running, connections: int = 64) -> httpx.AsyncClient:
    """A client of a server, for many requests at a time."""
    limits = httpx.Limits(max_connections=connections)
    return httpx.AsyncClient(base_url=server.base, headers=server.headers, timeout=PATIENCE, limits=limits)


async def all_of(*waiting: Any) -> list[Any]:
    """What all of these give, an exception for one that fails."""
    return await asyncio.gather(*waiting, return_exceptions=True)
