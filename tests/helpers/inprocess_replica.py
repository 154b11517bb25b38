"""A replica over a tiny model whose tokens are bytes, and how to talk to it without a server."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
from byte_model import byte_model
from fastapi import FastAPI

from baklava.plan.budget_plan import BudgetPlan, full_plan
from baklava.runtime.model_loader import LoadedModel
from serve_app.api.handlers import Replica
from serve_app.api.metrics import Metrics
from serve_app.engine.engine import Engine, Limits
from serve_app.openai.tokenization import Prompts
from serve_app.replication.coordinator import Board, Follower, Order

LOCAL = "http://localhost"
POOL = 64 << 20


def byte_loaded(tiny: Callable[..., LoadedModel], **fields: Any) -> LoadedModel:
    return byte_model(tiny, **fields)


def full(loaded: LoadedModel) -> BudgetPlan:
    return full_plan(loaded.identity, loaded.geometry, loaded.max_length, bits=32)


def make_replica(
    loaded: LoadedModel, plan: BudgetPlan | None = None, limits: Limits | None = None, name: str = "one", **more: Any
) -> Replica:
    engine = Engine(loaded, plan or full(loaded), limits or Limits(POOL))
    return replica_of(engine, loaded, name, **more)


def replica_of(
    engine: Any, loaded: LoadedModel, name: str = "one", board: Any = None, order: Order | None = None, **more: Any
) -> Replica:
    """A replica around an engine, or around whatever is asked as one, that follows an order when it comes up."""
    metrics = Metrics("tiny", name, engine.state, lambda: engine.plan)
    follower = Follower(engine, board or Board(), name, lambda: {"id": "tiny"}, lambda: metrics.text, order)
    return Replica(engine, Prompts.of(loaded), metrics, follower, "tiny", created=1, **more)


def ask(app: FastAPI, method: str, path: str, base: str = LOCAL, faults: bool = True, **options: Any) -> httpx.Response:
    """The answer of an app. Without `faults`, what the app would log as a fault of its own is raised here."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=not faults)
        async with httpx.AsyncClient(transport=transport, base_url=base, timeout=60) as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
