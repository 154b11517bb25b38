"""All that is measured of serving, one thing after the other."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from baklava.console import log
from baklava.errors import UserError
from baklava.evaluation.speed.timing import machine_info
from baklava.plan.budget_plan import BudgetPlan, full_cache_plan
from baklava.runtime.model_loader import LoadedModel, load
from benchmarks.serve import engine_overhead as engine
from benchmarks.serve.config import Asked
from benchmarks.serve.load_generator import Prompt, Prompts, closed, figures, opened
from benchmarks.serve.servers import BATCHED, FULL, PEER, PLAN, Server, server

PARTS = ("fits", "together", "overhead", "beside", "shared", "closed", "open")
"""Sequences that fit, by sum and by trial; steps of the engine alone; servers over HTTP, under three kinds of load."""

PATIENCE = 3600.0
"""Seconds that a client waits for the next token."""


def study(asked: Asked, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """The figures of these parts; the open loop needs the closed one, and brings it.

    Raises:
        UserError: an unknown part, a plan for another model, or a server that does not come up.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise UserError(f"--parts {unknown[0]}: no such part; take some of {', '.join(PARTS)}")
    loaded = load(asked.model, threads=asked.threads)
    plan = _plan(loaded, asked.plan)
    found: dict[str, Any] = {
        "benchmark": "serve",
        "asked": asdict(asked),
        "machine": machine_info(),
        "ratio": plan.ratio,
    }
    found |= _inside(loaded, plan, asked, parts)
    if "shared" in parts:
        found["shared"] = _shared(Prompts(loaded, asked.texts, asked.seed), asked)
    if {"closed", "open"} & set(parts):
        found |= _over_http(Prompts(loaded, asked.texts, asked.seed), asked, "open" in parts)
    return found


def _plan(loaded: LoadedModel, path: str) -> BudgetPlan:
    plan = BudgetPlan.read(path)
    plan.validate_for(loaded.identity, loaded.geometry)
    return plan


def _inside(loaded: LoadedModel, plan: BudgetPlan, asked: Asked, parts: Sequence[str]) -> dict[str, Any]:
    """What is measured without HTTP."""
    full = full_cache_plan(loaded.identity, loaded.geometry, loaded.max_length)
    others = {Path(path).name: _plan(loaded, path) for path in asked.others}
    prompts, found = Prompts(loaded, asked.texts, asked.seed), dict[str, Any]()

    def ids(tokens: int) -> list[int]:
        return loaded.tokenizer.encode(prompts.of(tokens).text, verbose=False)[:tokens]

    if "fits" in parts:
        found["fits"] = engine.fits(loaded, plan, full, asked)
    measures: dict[str, Callable[[BudgetPlan], Any]] = {
        "together": lambda each: engine.together(loaded, each, asked, ids(asked.prompt)),
        "overhead": lambda each: engine.overhead(loaded, each, asked, ids(asked.prompt)),
        "beside": lambda each: engine.beside(loaded, each, asked, ids(asked.prompt), ids(asked.entering)),
    }
    for part, measure in measures.items():
        if part in parts:
            measured = {PLAN: plan, FULL: full} | (others if part == "overhead" else {})
            for name, each in measured.items():
                log(f"{part}: {name}")
                found.setdefault(part, {})[name] = measure(each)
    return found


def _shared(prompts: Prompts, asked: Asked) -> dict[str, Any]:
    """Requests that begin with one declared prompt and differ at its end, so that all of them decode together."""
    common = prompts.of(asked.prompt)
    text = common.text.rstrip()  # a word behind a space begins a token of its own
    same = [Prompt(f"{text} Item {place} is", common.tokens) for place in range(asked.concurrent)]
    found: dict[str, Any] = {}
    for name in (PLAN, FULL):
        with server(name, asked, text) as up:
            log(f"a declared prompt: {name}")
            closed(up.address, up.model, same[:1], 2, 1, PATIENCE)  # its snapshot is there when this is answered
            found[name] = _closed(up, asked, same[:1], same)
    return found


def _over_http(prompts: Prompts, asked: Asked, with_open: bool) -> dict[str, Any]:
    same = [prompts.of(asked.prompt) for _ in range(asked.closed)]
    warm_up = [prompts.of(min(64, asked.prompt))]
    found: dict[str, Any] = {"closed": {}}
    for name in (PLAN, FULL, PEER, BATCHED):
        with server(name, asked) as up:
            log(f"closed loop: {name}")
            found["closed"][name] = _closed(up, asked, warm_up, same)
    if with_open:
        found["open"] = _opened(prompts, asked, found["closed"][PLAN]["requests_per_second"], warm_up)
    return found


def _closed(up: Server, asked: Asked, warm_up: Sequence[Prompt], prompts: Sequence[Prompt]) -> dict[str, Any]:
    closed(up.address, up.model, warm_up, 4, 1, PATIENCE)
    before = up.resident
    ran = closed(up.address, up.model, prompts, asked.generated, asked.concurrent, PATIENCE, asked.limit)
    return figures(ran, asked.ttft, asked.tpot) | {"resident_before": before, "resident_after": up.resident}


def _opened(prompts: Prompts, asked: Asked, served: float, warm_up: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Every contestant at the same rates, with the same prompts at the same times."""
    sent, rows = [prompts.between(*asked.prompts) for _ in range(asked.open)], []
    for name in (PLAN, FULL, PEER):  # the other peer would take an hour
        with server(name, asked) as up:
            closed(up.address, up.model, warm_up, 4, 1, PATIENCE)
            for share in asked.rates:
                log(f"open loop at {share:g} of what the plan served: {name}")
                rate = share * served
                ran = opened(up.address, up.model, sent, asked.generated, rate, asked.seed, PATIENCE)
                rows.append({"server": name, "share": share, "rate": rate} | figures(ran, asked.ttft, asked.tpot))
    return rows
