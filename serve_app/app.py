"""The Ray Serve deployment: replicas of a model inside its plan, behind one HTTP address."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Ray reads these when it is imported. Token auth must be asked for, since Ray listens on all interfaces.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import BackpressureConfig, HTTPOptions
from ray.serve.schema import LoggingConfig
from transformers.utils.logging import disable_progress_bar

from baklava.errors import UserError
from baklava.model import load
from baklava.plan import BudgetPlan, full_plan
from serve_app.engine import Engine
from serve_app.listen import check_answers
from serve_app.prompts import Prompts
from serve_app.routes import Replica, create_app
from serve_app.turns import Turns

APP = "baklava"

WAITING = 16
"""Requests that wait for a replica's one generation at a time; more are told to come back."""

REQUEST_SECONDS = 600.0
"""Longest life of a request, its wait included; a whole context of a small model on a CPU fits."""

DRAIN_SECONDS = 60.0
"""How long a replica that is told to stop may take to end its requests."""

OBJECT_STORE_BYTES = 128 << 20  # nothing large travels through it

# Serve's own bounds are an outer net: the replica refuses first, with a body that clients can read, and never keeps
# /health and /v1/models waiting behind a generation.
_NET = 4 * WAITING
_NET_SECONDS = 10.0


@dataclass(frozen=True)
class Settings:
    """What a replica needs to come up. Without a plan it keeps every entry; `threads` are torch's, 0 its default."""

    model: str
    plan: BudgetPlan | None
    created: int
    threads: int
    key_digests: frozenset[str] = frozenset()


@serve.ingress()
class Server:
    """One replica: loads the model, holds it inside the plan, and answers HTTP."""

    def __init__(self, settings: Settings) -> None:
        disable_progress_bar()
        loaded = load(settings.model, threads=settings.threads)
        plan = settings.plan or full_plan(loaded.identity, loaded.geometry, loaded.max_length)
        turns = Turns(WAITING, REQUEST_SECONDS)
        self._replica = Replica(Engine(loaded, plan), Prompts.of(loaded), turns, loaded.identity.id, settings.created)
        self._key_digests = settings.key_digests

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray Serve asks a replica for once it is up."""
        return create_app(self._replica, self._key_digests)

    def about(self) -> dict[str, Any]:
        """The model and the plan as the replica really has them."""
        return {"model": self._replica.card, "plan": self._replica.plan}


@contextmanager
def session(replicas: int) -> Iterator[None]:
    """A connection to the cluster at `$RAY_ADDRESS`, else to one of this machine's own that ends with the block.

    Raises:
        UserError: no cluster answers, it is too small, or it serves something already.
    """
    address = os.environ.get("RAY_ADDRESS")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if address:
        check_answers(address)
    try:
        # Without "local", Ray would join any cluster that was started on this machine.
        ray.init(address or "local", logging_level="ERROR", **({} if address else _own_cluster(replicas)))
    except (OSError, ValueError, RayError) as error:
        raise UserError(f"no Ray cluster answers at {address} ({error}); check RAY_ADDRESS and the token") from None
    try:
        _check_room(replicas)
        yield
    finally:
        ray.shutdown()


def _own_cluster(replicas: int) -> dict[str, Any]:
    cpus = max(replicas, os.cpu_count() or 1)
    return {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}


def _check_room(replicas: int) -> None:
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if replicas > cpus:
        raise UserError(f"--replicas {replicas} does not fit on {cpus} CPUs, one replica each; ask for fewer")
    if serve.status().proxies:
        raise UserError("Ray Serve already runs on this cluster; end it with `serve shutdown`, or use another cluster")


@contextmanager
def deployed(settings: Settings, host: str, port: int, replicas: int) -> Iterator[dict[str, Any]]:
    """Serve for as long as the block lasts; yields what a replica says about itself once all of them are ready.

    Raises:
        UserError: the model cannot be loaded, or the plan is not for it.
    """
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    http = HTTPOptions(host=host, port=port, request_timeout_s=REQUEST_SECONDS + _NET_SECONDS)
    try:
        serve.start(http_options=http, logging_config=quiet)
        yield _run(_deployment(replicas, quiet).bind(settings)).about.remote().result()
    finally:
        try:
            # Lets requests under way end, for at most DRAIN_SECONDS; shutting down at once would cut them.
            serve.delete(APP)
        finally:
            serve.shutdown()


def _run(application: serve.Application) -> Any:
    try:
        return serve.run(application, name=APP, route_prefix="/")
    except RuntimeError:
        # Serve keeps what a replica raised only as the text of its stack trace.
        trace = serve.status().applications[APP].deployments[APP].message
        sentence = re.search(rf"{UserError.__name__}: (.+)", trace)
        if sentence is None:
            raise
        raise UserError(sentence[1]) from None


def _deployment(replicas: int, log: LoggingConfig) -> serve.Deployment:
    gpus = ray.cluster_resources().get("GPU", 0)
    return serve.deployment(
        Server,
        name=APP,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": min(1, gpus / replicas)},
        max_ongoing_requests=_NET,
        max_queued_requests=_NET,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=5),
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        logging_config=log,
        max_constructor_retry_count=1,
    )
