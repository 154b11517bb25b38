"""One replica as Ray Serve runs it: loads the model, holds it inside the plan, answers HTTP."""

import logging
from dataclasses import dataclass
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from transformers.utils.logging import disable_progress_bar

from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan, full_plan
from baklava.runtime.model_loader import LoadedModel, load
from serve_app.api.handlers import REQUEST_SECONDS, Replica
from serve_app.api.metrics import Metrics
from serve_app.api.network import NO_KEYS, Keys
from serve_app.api.routes import create_app
from serve_app.deployment.autoscaling import LOAD
from serve_app.deployment.autoscaling import load as load_of
from serve_app.engine.chunk_size import BESIDE
from serve_app.engine.engine import Engine, Limits
from serve_app.engine.memory import PoolSize, free_bytes, table
from serve_app.openai.tokenization import Declared, Prompts
from serve_app.replication.coordinator import Follower, Order, Report

logger = logging.getLogger("ray.serve")

_BOARD_SECONDS = 5.0


@dataclass(frozen=True)
class Settings:
    """What a replica needs to come up. Without a plan it keeps every entry; `threads` are torch's, 0 its default.

    `waiting` is the number of requests that wait, `beside` the time that a step may give to a prompt, in that of its
    decode batch, `seconds` the longest life of a request, `host` where Serve listens.
    """

    model: str
    plan: BudgetPlan | None
    created: int
    threads: int
    pool: PoolSize
    waiting: int
    declared: tuple[Declared, ...] = ()
    keys: Keys = NO_KEYS
    seconds: float = REQUEST_SECONDS
    host: str = "localhost"
    beside: float = BESIDE


class RemoteBoard:
    """The board as an actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def report(self, report: Report) -> Order:
        """Hear a replica, and tell it what to do."""
        return ray.get(self._actor.report.remote(report), timeout=_BOARD_SECONDS)

    def offer(self, plan: str) -> Order:
        """Put a plan in force."""
        return ray.get(self._actor.offer.remote(plan), timeout=_BOARD_SECONDS)

    def order(self) -> Order:
        """What is in force."""
        return ray.get(self._actor.order.remote(), timeout=_BOARD_SECONDS)

    def drain(self) -> Order:
        """Tell all replicas to take no more requests."""
        return ray.get(self._actor.drain.remote(), timeout=_BOARD_SECONDS)

    def leave(self, replica: str) -> None:
        """A replica ends."""
        ray.get(self._actor.leave.remote(replica), timeout=_BOARD_SECONDS)

    def reports(self) -> list[Report]:
        """The last word of every replica."""
        return ray.get(self._actor.reports.remote(), timeout=_BOARD_SECONDS)


@serve.ingress()
class Server:
    """What Ray Serve starts, asks and ends."""

    _follower: Follower | None = None

    def __init__(self, settings: Settings, actor: Any) -> None:
        disable_progress_bar()
        self._loaded = loaded = load(settings.model, threads=settings.threads)
        board = RemoteBoard(actor)
        order = board.order()
        self._engine, followed = _started(loaded, settings, order)
        prompts = Prompts.of(loaded)
        for declared in settings.declared:
            self._engine.declare(declared.ids(prompts))
        name = serve.get_replica_context().replica_id.unique_id
        self._metrics = Metrics(loaded.identity.id, name, self._engine.state, lambda: self._engine.plan)
        self._follower = Follower(
            self._engine, board, name, lambda: self._replica.card, lambda: self._metrics.text, followed
        )
        self._replica = Replica(
            self._engine,
            prompts,
            self._metrics,
            self._follower,
            loaded.identity.id,
            settings.created,
            settings.seconds,
        )
        self._keys, self._host = settings.keys, settings.host
        self._follower.once()
        self._follower.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray Serve asks a replica for once it is up."""
        return create_app(self._replica, self._keys, self._host)

    def __del__(self) -> None:
        # Ray Serve calls this before it ends a replica, which may never have come up.
        if self._follower:
            self._follower.stop()

    def check_health(self) -> None:
        """Ray Serve replaces a replica that raises here."""
        if not self._engine.state().alive:
            raise RuntimeError("the engine has died")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """How full this replica is, for the autoscaler."""
        state = self._engine.state()
        return {
            LOAD: load_of(state.reserved_bytes, state.waiting, self._engine.plan.bytes_per_sequence, state.pool_bytes)
        }

    def about(self) -> dict[str, Any]:
        """The model, the plan and the pool as the replica really has them."""
        pool = self._engine.limits.pool_bytes
        fits = table(self._loaded, self._engine.plan, pool)
        return {"model": self._replica.card, "plan": self._replica.plan, "pool_bytes": pool, "fits": fits}


def _started(loaded: LoadedModel, settings: Settings, order: Order) -> tuple[Engine, Order]:
    """An engine inside the plan that is in force, and the order that this follows."""
    pool = settings.pool.bytes_of(free_bytes(loaded.device.type == "cuda"))
    limits = Limits(pool, settings.waiting, beside=settings.beside)
    if order.version:
        try:
            return Engine(loaded, BudgetPlan.model_validate_json(order.plan), limits), order
        except UserError as error:
            logger.error("starts in the plan of the command line: %s", error)
    plan = settings.plan or full_plan(loaded.identity, loaded.geometry, loaded.max_length)
    return Engine(loaded, plan, limits), Order(draining=order.draining)
