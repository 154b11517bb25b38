"""Facts about the benchmark of serving: times are counted right, loads are what they say, tables tell the aims."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from byte_model import byte_model
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from plan_factory import make_plan

from baklava.errors import UserError
from baklava.eviction import HeavyHitter
from baklava.plan.budget_plan import full_cache_plan
from benchmarks.serve import engine_overhead as engine
from benchmarks.serve.config import Asked, quick
from benchmarks.serve.load_generator import Prompt, Prompts, Ran, Sent, closed, figures, opened, spread
from benchmarks.serve.markdown import table
from benchmarks.serve.plot import draw
from benchmarks.serve.run import study
from benchmarks.serve.servers import BATCHED, FULL, PEER, PLAN

PROMPTS = [Prompt(f"p{place}", 1) for place in range(6)]


class Fake:
    """A server that takes its time, and remembers who was there."""

    def __init__(self, seconds: float = 0.02, tokens: int = 4, refuse: int = 0) -> None:
        self.seconds, self.tokens, self.refuse = seconds, tokens, refuse
        self.present = self.most = 0
        self.came: list[float] = []
        self.bodies: list[dict[str, Any]] = []

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/completions")
        async def complete(request: Request) -> Any:
            self.came.append(time.perf_counter())
            self.bodies.append(await request.json())
            if len(self.came) <= self.refuse:
                return JSONResponse({"error": {"message": "full"}}, 429)
            return StreamingResponse(self.stream(), media_type="text/event-stream")

        @app.get("/metrics")
        async def metrics() -> Any:
            from fastapi.responses import PlainTextResponse

            return PlainTextResponse(f'baklava:num_requests_running{{replica="a"}} {self.present}\nother 3\n')

        return app

    async def stream(self) -> Any:
        self.present += 1
        self.most = max(self.most, self.present)
        for _ in range(self.tokens):
            await asyncio.sleep(self.seconds)
            yield f"data: {json.dumps({'choices': [{'text': 'x'}]})}\n\n"
        yield ": ping\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': {}})}\n\ndata: [DONE]\n\n"
        self.present -= 1


@contextmanager
def up(fake: Fake) -> Iterator[str]:
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


def test_a_closed_loop_keeps_so_many_requests_there_and_times_every_token() -> None:
    fake = Fake()
    with up(fake) as address:
        ran = closed(address, "m", PROMPTS, 4, 2, 30)
    assert fake.most == 2
    assert len(ran.sent) == 6
    assert all(each.good and len(each.arrivals) == 4 for each in ran.sent)
    assert all(0.015 < each.tpot < 0.5 and each.ttft >= 0.015 for each in ran.sent)
    assert ran.seconds >= 3 * 4 * 0.02
    wanted = {"model": "m", "max_tokens": 4, "temperature": 0, "stream": True}
    assert all(wanted.items() <= body.items() for body in fake.bodies)
    assert sorted(body["prompt"] for body in fake.bodies) == [prompt.text for prompt in PROMPTS]
    assert ran.gauges["num_requests_running"] >= 0


def test_an_open_loop_sends_whether_answers_come_or_not_and_a_seed_repeats_it() -> None:
    fake = Fake(seconds=0.3, tokens=2)
    with up(fake) as address:
        ran = opened(address, "m", PROMPTS, 2, rate=100.0, seed=1, timeout=30)
    assert fake.most == 6
    assert ran.seconds < 3
    dues = [each.due for each in ran.sent]
    assert dues == sorted(dues)


def test_refused_and_broken_answers_are_counted_and_no_latencies() -> None:
    with up(Fake(refuse=2)) as address:
        ran = closed(address, "m", PROMPTS, 4, 1, 30)
    found = figures(ran, 60, 60)
    assert (found["answered"], found["refused"], found["failed"]) == (4, 2, 0)
    lost = closed("http://127.0.0.1:9", "m", PROMPTS[:2], 4, 1, 5)
    assert figures(lost, 60, 60)["failed"] == 2
    assert figures(lost, 60, 60)["tpot"] is None


def test_what_does_not_come_in_time_is_not_waited_for_and_its_tokens_are_timed() -> None:
    with up(Fake(seconds=0.2, tokens=50)) as address:
        ran = closed(address, "m", PROMPTS, 50, 2, 30, limit=1.0)
    found = figures(ran, 60, 60)
    assert ran.seconds < 3
    assert (found["requests"], found["answered"], found["failed"]) == (2, 0, 2)
    assert found["requests_per_second"] == 0
    assert 0.1 < found["tpot"]["p50"] < 0.5


def sent(first: float, gap: float, tokens: int = 5) -> Sent:
    arrivals = tuple(first + gap * place for place in range(tokens))
    return Sent(0.0, 200, arrivals, arrivals[-1], 10)


def test_figures_are_medians_and_goodput_needs_both_bounds() -> None:
    ran = Ran((sent(1, 0.1), sent(2, 0.2), sent(9, 0.1), sent(1, 3.0)), 10.0, {})
    found = figures(ran, ttft=5.0, tpot=1.0)
    assert found["ttft"]["p50"] == 1.5
    assert found["tpot"]["p50"] == pytest.approx(0.15)
    assert found["goodput"] == pytest.approx(0.2)
    assert found["requests_per_second"] == pytest.approx(0.4)
    assert found["tokens_per_second"] == pytest.approx(2.0)
    assert spread([]) is None
    assert spread([2.0])["p99"] == 2.0


@pytest.fixture
def loaded(tiny):
    return byte_model(tiny)


@pytest.fixture
def plan(loaded):
    return make_plan(loaded, [[12, 24]] * 2, HeavyHitter(eviction_interval=4, distance=0), 16, 256)


SMALL = replace(quick(), batch=3, steps=8, generated=6, prompt=40, entering=120, pool=60_000, contexts=(64, 128, 256))


def test_the_engine_is_timed_beside_its_forward_and_beside_a_prompt(loaded, plan) -> None:
    prompt, long = list(range(32, 72)), list(range(1, 121))
    found = engine.overhead(loaded, plan, SMALL, prompt)
    assert 0 < found["model"] < found["step"]
    assert found["overhead"] == pytest.approx(found["step"] / found["model"] - 1)
    beside = engine.beside(loaded, plan, SMALL, prompt, long)
    assert beside["tokens"] == 120
    assert beside["idle"]["p50"] > 0
    assert beside["seconds"] > 0


def test_sequences_that_run_together_are_as_many_as_fit(loaded, plan) -> None:
    full = full_cache_plan(loaded.identity, loaded.geometry, 256)
    asked = replace(SMALL, generated=60, pool=250_000)
    rows = engine.fits(loaded, plan, full, asked)
    assert [row["tokens"] for row in rows] == [64, 128, 256]
    assert all(row["plan"] > row["full"] for row in rows), rows
    ours, dense = (engine.together(loaded, each, asked, list(range(32, 72))) for each in (plan, full))
    assert ours["failed"] == dense["failed"] == 0
    assert ours["together"] > dense["together"] >= 1
    assert max(ours["held"], dense["held"]) <= asked.pool


def run_figures() -> dict[str, Any]:
    loads = {
        name: figures(Ran((sent(1, gap), sent(1, gap)), 4 * gap, {"kv_allocated_bytes": 2.0**20}), 60, 60)
        for name, gap in ((PLAN, 0.1), (FULL, 0.2), (PEER, 0.05), (BATCHED, 1.0))
    }
    rows = [{"server": name, "share": 0.5, "rate": 0.25} | each for name, each in loads.items()]
    count = {"asked": 70, "held": 1, "pool": 2, "failed": 0}
    return {
        "asked": {"pool": 640 << 20, "prompt": 4096, "prompts": (2048, 6144), "generated": 64, "concurrent": 8},
        "fits": [{"tokens": 1024, "full": 20, "plan": 90}, {"tokens": 4096, "full": 5, "plan": 60}],
        "together": {PLAN: count | {"together": 60}, FULL: count | {"together": 5}},
        "overhead": {
            PLAN: {"batch": 8, "step": 0.11, "model": 0.1, "overhead": 0.1},
            FULL: {"batch": 8, "step": 0.22, "model": 0.2, "overhead": 0.1},
        },
        "beside": {PLAN: {"tokens": 6144, "idle": {"p50": 0.1, "p99": 0.2}, "beside": {"p50": 0.2, "p99": 0.3}}},
        "shared": {PLAN: loads[PLAN], FULL: loads[FULL]},
        "closed": loads,
        "open": rows,
    }


def test_the_tables_tell_what_was_measured_next_to_what_was_aimed_at(tmp_path: Path) -> None:
    found = run_figures()
    told = table(found)
    assert "| 60 / 5 = 12.0 ×, 0 failed | ≥ 6 ×, none failed |" in told
    assert "| 0.10 × | ≤ 0.20 × |" in told
    assert "| 0.50 × | ≤ 0.67 × |" in told
    assert "| 2.00 × |  |" in told
    assert "| 0.5 × | ≥ 2 × |" in told
    assert "| 10.0 × | ≥ 2 × |" in told
    assert "10.0% of 100 ms" in told
    assert "| 1.5 × | ≤ 2.5 × |" in told
    assert "| 3.0 × |  |" in told
    assert told.count("1 MiB") == 10
    assert "| transformers serve | 0.250 |" in told
    draw(found, tmp_path / "serve.svg")
    drawn = (tmp_path / "serve.svg").read_text()
    assert "<svg" in drawn
    assert table({"asked": found["asked"]}) == ""


def test_a_server_that_answered_nothing_is_failed_and_has_no_ratio() -> None:
    found = run_figures()
    found["closed"][BATCHED] |= {"answered": 0, "failed": 8, "requests_per_second": 0.0, "ttft": None}
    page = table(found)
    for figure in ("median TPOT", "requests per second", "median time to the last token"):
        row = next(line for line in page.splitlines() if line.startswith(f"| {figure} over") and BATCHED in line)
        assert row.split(" | ")[1] == "failed"
    assert f"| {BATCHED} | failed | failed | 0.000 |" in page


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(UserError, match="no such part; take some of fits"):
        study(Asked(), ("speed",))


def test_prompts_have_the_tokens_asked_for_and_a_seed_repeats_them(loaded, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("The river goes down to the sea, and the sea is wide. " * 40)
    first, again = (Prompts(loaded, str(tmp_path), 3) for _ in range(2))
    made = [first.of(50), first.between(20, 30)]
    assert [again.of(50), again.between(20, 30)] == made
    assert made[0].tokens == len(made[0].text) == 50
    assert 20 <= made[1].tokens <= 30
    with pytest.raises(UserError, match="name longer texts"):
        first.of(5000)
