"""Facts about the serving benchmark: latencies are measured right, loads are as described, tables have the aims."""

import asyncio
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn
from byte_model import byte_model
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from plan_factory import make_plan

from baklava.errors import UserError
from baklava.eviction import HeavyHitter
from baklava.plan.budget_plan import full_cache_plan
from benchmarks.openvino.server import parse_args
from benchmarks.serve import servers
from benchmarks.serve.engine_overhead import (
    concurrent_sequences,
    decode_alongside_prefill,
    engine_overhead,
    pool_capacity,
)
from benchmarks.serve.load_generator import (
    LoadResult,
    Prompt,
    PromptSampler,
    RequestResult,
    failed_load,
    percentiles,
    run_closed_loop,
    run_open_loop,
    summarize,
)
from benchmarks.serve.prefix_caching import WITH, WITHOUT
from benchmarks.serve.report import format_tables, plot
from benchmarks.serve.run import measure_closed_loops, run_benchmark
from benchmarks.serve.servers import (
    FULL,
    OPENVINO,
    OPENVINO_EVICTION,
    OURS,
    PEERS,
    PLAN,
    PLAN_STREAMS,
    TRANSFORMERS,
    TRANSFORMERS_BATCHING,
    RunningServer,
    ServeBenchmarkConfig,
    quick_config,
    server_command,
)

PROMPTS = [Prompt(f"p{index}", 1) for index in range(6)]


class FakeServer:
    """A server with a fixed time per token, which counts its concurrent requests and rejects the first few."""

    def __init__(self, seconds: float = 0.02, tokens: int = 4, num_rejected: int = 0) -> None:
        self.seconds, self.tokens, self.num_rejected = seconds, tokens, num_rejected
        self.running = self.max_running = 0
        self.bodies: list[dict[str, Any]] = []

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/completions")
        async def complete(request: Request) -> Any:
            self.bodies.append(await request.json())
            if len(self.bodies) <= self.num_rejected:
                return JSONResponse({"error": {"message": "full"}}, 429)
            return StreamingResponse(self.stream(), media_type="text/event-stream")

        @app.get("/metrics")
        async def metrics() -> Any:
            from fastapi.responses import PlainTextResponse

            return PlainTextResponse(f'baklava:num_requests_running{{replica="a"}} {self.running}\nother 3\n')

        return app

    async def stream(self) -> Any:
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        for _ in range(self.tokens):
            await asyncio.sleep(self.seconds)
            yield f"data: {json.dumps({'choices': [{'text': 'x'}]})}\n\n"
        yield ": ping\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': {}})}\n\ndata: [DONE]\n\n"
        self.running -= 1


@contextmanager
def serving(fake: FakeServer) -> Iterator[str]:
    config = uvicorn.Config(fake.app(), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def test_a_closed_loop_keeps_its_concurrency_and_times_every_token() -> None:
    fake = FakeServer()
    with serving(fake) as address:
        load = run_closed_loop(address, "m", PROMPTS, 4, 2, 30)
    assert fake.max_running == 2
    assert len(load.requests) == 6
    assert all(request.is_completed and len(request.token_times) == 4 for request in load.requests)
    assert all(request.tpot > 0.015 and request.ttft >= 0.015 for request in load.requests)
    assert load.seconds >= 3 * 4 * 0.02
    expected = {"model": "m", "max_tokens": 4, "temperature": 0, "stream": True}
    assert all(expected.items() <= body.items() for body in fake.bodies)
    assert sorted(body["prompt"] for body in fake.bodies) == [prompt.text for prompt in PROMPTS]
    assert load.peak_gauges["num_requests_running"] >= 0


def test_an_open_loop_sends_requests_without_waiting_for_answers() -> None:
    fake = FakeServer(seconds=0.3, tokens=2)
    with serving(fake) as address:
        load = run_open_loop(address, "m", PROMPTS, 2, rate=100.0, seed=1, timeout=30)
    assert fake.max_running == 6
    dues = [request.due for request in load.requests]
    assert dues == sorted(dues)


def test_rejected_and_broken_answers_are_counted_without_latencies() -> None:
    with serving(FakeServer(num_rejected=2)) as address:
        load = run_closed_loop(address, "m", PROMPTS, 4, 1, 30)
    summary = summarize(load, 60, 60)
    assert (summary["completed"], summary["rejected"], summary["failed"]) == (4, 2, 0)
    lost = run_closed_loop("http://127.0.0.1:9", "m", PROMPTS[:2], 4, 1, 5)
    assert summarize(lost, 60, 60)["failed"] == 2
    assert summarize(lost, 60, 60)["tpot"] is None


def test_a_closed_loop_ends_at_its_limit_and_keeps_the_token_times() -> None:
    with serving(FakeServer(seconds=0.2, tokens=50)) as address:
        load = run_closed_loop(address, "m", PROMPTS, 50, 2, 30, max_seconds=1.0)
    summary = summarize(load, 60, 60)
    assert (summary["requests"], summary["completed"], summary["failed"]) == (2, 0, 2)
    assert summary["requests_per_second"] == 0
    assert summary["tpot"]["p50"] > 0.1


def request_result(first: float, gap: float, tokens: int = 5) -> RequestResult:
    token_times = tuple(first + gap * index for index in range(tokens))
    return RequestResult(0.0, 200, token_times, token_times[-1], 10)


def test_latencies_are_medians_and_goodput_needs_both_bounds() -> None:
    requests = [request_result(*times) for times in ((1, 0.1), (2, 0.2), (9, 0.1), (1, 3.0))]
    summary = summarize(LoadResult(tuple(requests), 10.0, {}), max_ttft=5.0, max_tpot=1.0)
    assert summary["ttft"]["p50"] == 1.5
    assert summary["tpot"]["p50"] == pytest.approx(0.15)
    assert summary["goodput"] == pytest.approx(0.2)
    assert summary["requests_per_second"] == pytest.approx(0.4)
    assert summary["tokens_per_second"] == pytest.approx(2.0)
    assert percentiles([]) is None
    assert percentiles([2.0])["p99"] == 2.0


@pytest.fixture
def loaded(tiny):
    return byte_model(tiny)


@pytest.fixture
def plan(loaded):
    return make_plan(loaded, [[12, 24]] * 2, HeavyHitter(eviction_interval=4, distance=0), 16, 256)


SMALL = replace(
    quick_config(),
    batch_size=3,
    decode_steps=8,
    output_tokens=6,
    prompt_tokens=40,
    long_prompt_tokens=120,
    pool_bytes=60_000,
    contexts=(64, 128, 256),
)


def test_the_engine_is_timed_with_its_forward_and_alongside_a_prefill(loaded, plan) -> None:
    prompt, long_prompt = list(range(32, 72)), list(range(1, 121))
    step = engine_overhead(loaded, plan, SMALL, prompt)
    assert step["forward_seconds"] > 0
    assert step["overhead"] == pytest.approx(step["step_seconds"] / step["forward_seconds"] - 1)
    latencies = decode_alongside_prefill(loaded, plan, SMALL, prompt, long_prompt)
    assert latencies["prompt_tokens"] == 120
    assert latencies["idle"]["p50"] > 0
    assert latencies["prefill_seconds"] > 0


def test_more_sequences_run_together_under_a_plan(loaded, plan) -> None:
    full = full_cache_plan(loaded.identity, loaded.geometry, 256)
    config = replace(SMALL, output_tokens=40, pool_bytes=120_000)
    rows = pool_capacity(loaded, plan, full, config)
    assert [row["tokens"] for row in rows] == [64, 128, 256]
    assert all(row["plan"] > row["full"] for row in rows), rows
    smaller = replace(config, pool_bytes=60_000)
    ours, dense = (concurrent_sequences(loaded, candidate, smaller, list(range(32, 72))) for candidate in (plan, full))
    assert ours["failed"] == dense["failed"] == 0
    assert ours["running"] > dense["running"] >= 1
    assert max(ours["peak_bytes"], dense["peak_bytes"]) <= smaller.pool_bytes


def example_results() -> dict[str, Any]:
    loads = {
        name: summarize(LoadResult((request_result(1, gap),) * 2, 4 * gap, {"kv_allocated_bytes": 2.0**20}), 60, 60)
        for name, gap in (
            (PLAN, 0.1),
            (PLAN_STREAMS, 0.05),
            (FULL, 0.2),
            (TRANSFORMERS, 0.05),
            (TRANSFORMERS_BATCHING, 1.0),
            (OPENVINO, 0.4),
        )
    }
    loads[PLAN] |= {"prompts_per_second": loads[PLAN]["requests_per_second"] / 0.7}
    loads[OPENVINO_EVICTION] = failed_load("it is not installed", 8)
    rows = [{"server": name, "rate": 0.25} | load for name, load in loads.items()]
    count = {"submitted": 70, "peak_bytes": 1, "pool_bytes": 2, "failed": 0}
    return {
        "config": {
            "pool_bytes": 640 << 20,
            "prompt_tokens": 4096,
            "prompt_token_range": (2048, 6144),
            "output_tokens": 64,
            "concurrency": 8,
            "clients": 2,
            "document_tokens": 3072,
        },
        "pool_capacity": [{"tokens": 1024, "full": 20, "plan": 90}, {"tokens": 4096, "full": 5, "plan": 60}],
        "concurrent_sequences": {PLAN: count | {"running": 60}, FULL: count | {"running": 5}},
        "engine_overhead": {
            PLAN: {"batch_size": 8, "step_seconds": 0.11, "forward_seconds": 0.1, "overhead": 0.1},
            FULL: {"batch_size": 8, "step_seconds": 0.22, "forward_seconds": 0.2, "overhead": 0.1},
        },
        "decode_alongside_prefill": {
            PLAN: {
                "prompt_tokens": 6144,
                "idle": {"p50": 0.1, "p99": 0.2},
                "alongside_prefill": {"p50": 0.2, "p99": 0.3},
            }
        },
        "pinned_prefix": {PLAN: loads[PLAN], FULL: loads[FULL]},
        "prefix_caching": {
            name: {
                kind: {"first": loads[PLAN], "later": loads[later], "cached_bytes_per_prompt": 2.0}
                for kind in ("documents", "chats")
            }
            for name, later in ((WITH, PLAN_STREAMS), (WITHOUT, FULL))
        }
        | {"full_bytes_per_document": 16},
        "closed_loop": loads,
        "open_loop": rows,
    }


def test_the_tables_have_every_measurement_with_its_aim(tmp_path: Path) -> None:
    results = example_results()
    text = format_tables(results)
    assert "| 60 / 5 = 12.0 ×, 0 failed | ≥ 6 ×, none failed |" in text
    assert "| 0.50 × | ≥ 1.3 × |" in text
    assert "| 1.00 × | ≤ 0.8 × |" in text
    assert "| 2.00 × | ≤ 1.5 × |" in text
    assert "with --prefill-decode-ratio 0.5 | 1.00 × | ≤ 1.0 × |" in text
    assert "| 0.70 × | ≥ 0.85 × |" in text
    assert "| 2.00 × | ≥ 3 × |" in text
    assert "| 10.0 % of 100 ms | ≤ 3 % |" in text
    assert "| 3.0 × | ≤ 2.5 × |" in text
    assert "| 1.5 × |  |" in text
    assert "| 0.25 × |  |" in text
    assert text.count("1 MiB") == 14
    assert "| transformers serve | 0.250 |" in text
    assert "| later turn of a chat | 2, 0 failed | 1.00 s / 1.00 s | 1.00 × | 4.00 × |" in text
    assert "takes 0.125 of its full cache" in text
    plot(results, tmp_path / "serve.svg")
    assert "<svg" in (tmp_path / "serve.svg").read_text()
    assert format_tables({"config": results["config"]}) == ""


def test_a_server_that_completed_nothing_is_failed_and_has_no_ratio() -> None:
    results = example_results()
    results["closed_loop"][TRANSFORMERS_BATCHING] |= {
        "completed": 0,
        "failed": 8,
        "requests_per_second": 0.0,
        "ttft": None,
    }
    page = format_tables(results)
    for measure in ("median TPOT", "requests per second", "median TTFT"):
        row = next(
            line for line in page.splitlines() if line.startswith(f"| {measure} over") and TRANSFORMERS_BATCHING in line
        )
        assert row.split(" | ")[1] == "failed"
    assert f"| {TRANSFORMERS_BATCHING} | failed | failed | failed | failed | failed | 0 | 0 | 8 |" in page


@pytest.mark.parametrize("completed", [0, 7])
def test_a_peer_that_failed_has_no_figures_but_a_reason(completed: int) -> None:
    results = example_results()
    results["closed_loop"][OPENVINO] |= {"completed": completed, "failed": 8 - completed, "error": "the server ended"}
    lines = format_tables(results).splitlines()
    rows = [line for line in lines if f"`{OPENVINO}`" in line or f"`{OPENVINO_EVICTION}`" in line]
    assert [row.split(" | ")[1] for row in rows] == ["failed"] * 6
    assert (
        f"| {OPENVINO} | failed | failed | failed | failed | failed | {completed} | 0 | {8 - completed} | 1 MiB |"
        in lines
    )
    assert f"{OPENVINO} failed: the server ended" in lines
    assert f"{OPENVINO_EVICTION} failed: it is not installed" in lines


@contextmanager
def fake_running_server(name: str, config: ServeBenchmarkConfig) -> Iterator[RunningServer]:
    if name in (TRANSFORMERS_BATCHING, OPENVINO_EVICTION):
        raise UserError(f"{name} is not installed")
    script = "raise SystemExit('no memory')" if name == OPENVINO else "import time; time.sleep(600)"
    with tempfile.TemporaryFile() as log_file, serving(FakeServer()) as address:
        process = subprocess.Popen([sys.executable, "-c", script], stderr=log_file)
        try:
            server = RunningServer(address, "m", psutil.Process(process.pid), log_file)
            while name == OPENVINO and not server.has_ended:
                time.sleep(0.01)
            yield server
        finally:
            process.kill()
            process.wait()


def test_a_peer_that_does_not_start_or_ends_leaves_the_others_their_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.serve.run.running_server", fake_running_server)
    loads = measure_closed_loops(quick_config(), PROMPTS[:1], PROMPTS[1:])
    assert list(loads) == [*OURS, *PEERS]
    assert loads[PLAN]["prompts_per_second"] > 0
    errors = {name: load["error"] for name, load in loads.items() if "error" in load}
    assert errors == {
        TRANSFORMERS_BATCHING: f"{TRANSFORMERS_BATCHING} is not installed",
        OPENVINO: "the server ended: no memory",
        OPENVINO_EVICTION: f"{OPENVINO_EVICTION} is not installed",
    }
    assert {name: load["failed"] for name, load in loads.items()} == {
        PLAN: 0,
        PLAN_STREAMS: 0,
        FULL: 0,
        TRANSFORMERS: 0,
        TRANSFORMERS_BATCHING: 5,
        OPENVINO: 0,
        OPENVINO_EVICTION: 5,
    }
    json.dumps(loads, allow_nan=False)


def test_a_server_of_ours_that_does_not_start_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def not_starting(name: str, config: ServeBenchmarkConfig) -> Iterator[RunningServer]:
        raise UserError(f"{name} did not start")
        yield

    monkeypatch.setattr("benchmarks.serve.run.running_server", not_starting)
    with pytest.raises(UserError, match=f"{PLAN} did not start"):
        measure_closed_loops(quick_config(), PROMPTS[:1], PROMPTS)


@pytest.fixture
def openvino_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed environment whose Python copies the model as if it exported it, or fails for a broken one."""
    environment = tmp_path / "openvino/.venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "ready").touch()
    environment.with_name("requirements.txt").write_text("openvino==1\n")
    python = environment / "bin/python"
    python.write_text('#!/bin/sh\ngrep -q broken "$3"/config.json && echo "no such layer" && exit 1\nmkdir -p "$4"\n')
    python.chmod(0o755)
    monkeypatch.setattr(servers, "OPENVINO_ENVIRONMENT", environment)
    monkeypatch.setenv("BAKLAVA_CACHE", str(tmp_path / "cache"))
    return environment


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    return tmp_path / "model"


def test_openvino_serves_the_exported_model_in_the_same_precision_on_as_many_threads(
    openvino_environment: Path, model_folder: Path
) -> None:
    config = replace(ServeBenchmarkConfig(), dtype="bfloat16", threads=3)
    python, *module, _option, exported = server_command(OPENVINO, str(model_folder), config, 8001)[:5]
    assert (python, module) == (str(openvino_environment / "bin/python"), ["-m", "benchmarks.openvino.server"])
    assert Path(exported).is_dir()
    full, evicting = (
        parse_args(server_command(name, str(model_folder), config, 8001)[3:]) for name in (OPENVINO, OPENVINO_EVICTION)
    )
    assert (full.model, full.port, full.dtype, full.threads, full.sequences) == (Path(exported), 8001, "bfloat16", 3, 8)
    assert full.max_tokens >= 4096 + 64
    assert (full.kept_tokens, evicting.kept_tokens) == (None, 512)


def test_a_changed_model_is_exported_again_and_the_same_one_is_not(
    openvino_environment: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = server_command(OPENVINO, str(model_folder), quick_config(), 8001)
    (model_folder / "config.json").write_text('{"a": 1}')
    changed = server_command(OPENVINO, str(model_folder), quick_config(), 8001)
    assert changed[4] != first[4]
    (openvino_environment / "bin/python").unlink()
    monkeypatch.chdir(model_folder.parent)
    assert server_command(OPENVINO, "model", quick_config(), 8001) == changed


def test_openvino_without_its_environment_or_a_readable_model_says_why(
    openvino_environment: Path, model_folder: Path
) -> None:
    with pytest.raises(UserError, match="is not the folder of a model"):
        server_command(OPENVINO, "org/name", quick_config(), 8001)
    (model_folder / "config.json").write_text("broken")
    with pytest.raises(UserError, match="was not exported: no such layer"):
        server_command(OPENVINO, str(model_folder), quick_config(), 8001)
    (openvino_environment / "ready").unlink()
    with pytest.raises(UserError, match="run `make peers`"):
        server_command(OPENVINO_EVICTION, str(model_folder), quick_config(), 8001)


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(UserError, match="no such part; choose among pool_capacity"):
        run_benchmark(ServeBenchmarkConfig(), ("speed",))


def test_prompts_have_the_requested_tokens_and_repeat_with_their_seed(loaded, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("The river goes down to the sea, and the sea is wide. " * 40)
    first, again = (PromptSampler(loaded, str(tmp_path), 3) for _ in range(2))
    prompts = [first.sample(50), first.sample_between(20, 30)]
    assert [again.sample(50), again.sample_between(20, 30)] == prompts
    assert prompts[0].num_tokens == len(prompts[0].text) == 50
    assert 20 <= prompts[1].num_tokens <= 30
    with pytest.raises(UserError, match="name longer texts"):
        first.sample(5000)
