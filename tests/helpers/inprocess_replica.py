"""A replica over a tiny model whose tokens are bytes, and how to talk to it without a server."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
from byte_model import byte_model
from fastapi import FastAPI

from baklava.plan.budget_plan import BudgetPlan, full_cache_plan
from baklava.runtime.model_loader import LoadedModel
from serve_app.api.metrics import Metrics
from serve_app.api.routes import RequestHandlers
from serve_app.engine.engine import Engine, EngineConfig
from serve_app.openai.tokenization import PromptEncoder
from serve_app.replication.coordinator import INITIAL_STATE, Coordinator, DesiredState
from serve_app.replication.replica_sync import ReplicaReport, ReplicaSync

LOCAL = "http://localhost"
POOL = 64 << 20


def byte_loaded(tiny: Callable[..., LoadedModel], **fields: Any) -> LoadedModel:
    return byte_model(tiny, **fields)


def full(loaded: LoadedModel) -> BudgetPlan:
    return full_cache_plan(loaded.identity, loaded.geometry, loaded.max_length, bits=32)


def make_replica(
    loaded: LoadedModel,
    plan: BudgetPlan | None = None,
    limits: EngineConfig | None = None,
    name: str = "one",
    **more: Any,
) -> RequestHandlers:
    engine = Engine(loaded, plan or full(loaded), limits or EngineConfig(POOL))
    return replica_of(engine, loaded, name, **more)


class LocalGroup:
    """The replicas of a server in one process. Those in `silent` do not answer."""

    def __init__(self) -> None:
        self.coordinator, self.replicas = Coordinator(), dict[str, ReplicaSync]()
        self.silent: set[str] = set()

    def sync(self, applied: DesiredState) -> DesiredState:
        return self.coordinator.sync(applied)

    def publish_plan(self, plan: str) -> DesiredState:
        return self.coordinator.publish_plan(plan)

    def broadcast(self, desired: DesiredState | None = None) -> list[ReplicaReport | BaseException]:
        return [
            TimeoutError(name) if name in self.silent else sync.apply(desired) if desired else sync.report()
            for name, sync in self.replicas.items()
        ]


def replica_of(
    engine: Any,
    loaded: LoadedModel,
    name: str = "one",
    group: Any = None,
    applied: DesiredState = INITIAL_STATE,
    **more: Any,
) -> RequestHandlers:
    """A replica around an engine or a fake one, that has applied a state when it comes up."""
    metrics, group = Metrics("tiny", name, engine.state, lambda: engine.plan), group or LocalGroup()
    sync = ReplicaSync(engine, group, name, lambda: metrics.text, applied)
    if isinstance(group, LocalGroup):
        group.replicas[name] = sync
    return RequestHandlers(engine, PromptEncoder.from_model(loaded), metrics, sync, "tiny", created=1, **more)


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
