"""The Ray Serve deployment: replicas of a model inside its plan, behind one HTTP address."""

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from serve_app.api import proxy_middleware as front

# Ray reads these when it is imported. Token auth must be asked for, since Ray listens on all interfaces.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault(front.VARIABLE, front.PATH)

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig, HTTPOptions
from ray.serve.schema import LoggingConfig

from baklava.console import log
from baklava.errors import UserError
from serve_app.api.network import check_answers
from serve_app.deployment.replica import RemoteBoard, Server, Settings
from serve_app.replication.coordinator import Board

APP = "baklava"

OBJECT_STORE_BYTES = 128 << 20  # nothing large travels through it

# Serve's own bounds are an outer net: the replica refuses first, with a body that clients can read, and never keeps
# /health and /v1/models waiting behind a generation.
_NET = 4096
_NET_SECONDS = 30.0
_LOOK = 0.25  # seconds between looks at the board

_OPEN = (
    "warning: on a cluster that was started elsewhere, Ray Serve's own pages (/-/routes, /-/healthz) ask nobody for a "
    f"key, unless its nodes have {front.VARIABLE}={front.PATH}"
)


@dataclass(frozen=True)
class Scale:
    """Replicas to begin with, and the most that the load may bring about. `logs` is a folder for their logs."""

    replicas: int = 1
    most: int = 1
    logs: str | None = None


@contextmanager
def session(replicas: int, *, quiet: bool = False) -> Iterator[None]:
    """A connection to the cluster at `$RAY_ADDRESS`, else to one of this machine's own that ends with the block.

    With `quiet`, what Serve logs on it goes to files alone.

    Raises:
        UserError: no cluster answers, it is too small, or it serves something already.
    """
    address = os.environ.get("RAY_ADDRESS")
    if quiet:
        os.environ["RAY_SERVE_LOG_TO_STDERR"] = "0"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if address:
        check_answers(address)
        log(_OPEN)
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


@dataclass(frozen=True)
class Deployed:
    """A server that is up: what a replica said about itself, and the board of all of them."""

    about: dict[str, Any]
    board: RemoteBoard


@contextmanager
def deployed(settings: Settings, host: str, port: int, scale: Scale) -> Iterator[Deployed]:
    """Serve for as long as the block lasts; yields once all replicas are ready, and ends when their work has.

    Raises:
        UserError: the model cannot be loaded, the plan is not for it, or the pool does not hold one sequence.
    """
    log = LoggingConfig(
        log_level="INFO" if scale.logs else "WARNING",
        encoding="JSON" if scale.logs else "TEXT",
        logs_dir=scale.logs,
        enable_access_log=False,
    )
    http = HTTPOptions(host=host, port=port, request_timeout_s=settings.seconds + _NET_SECONDS)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board).remote()
    board = RemoteBoard(actor)
    try:
        serve.start(http_options=http, logging_config=log)
        about = _run(_application(settings, scale, log, actor)).about.remote().result()
        yield Deployed(about, board)
    finally:
        try:
            _drain(board, settings.seconds)
            serve.delete(APP)
        finally:
            serve.shutdown()


def _drain(board: RemoteBoard, seconds: float) -> None:
    """Let requests under way end while new ones are told 503; no longer than a request may live."""
    until = time.monotonic() + seconds
    try:
        board.drain()
        while time.monotonic() < until and any(_works(report.state) for report in board.reports()):
            time.sleep(_LOOK)
    except RayError as error:
        log(f"cannot wait for requests under way: {error}")


def _works(state: dict[str, Any]) -> bool:
    entering = state["held_bytes"] > state["snapshot_bytes"]  # a prompt is not running before all of it is there
    return not state["draining"] or entering or state["running"] > 0 or state["waiting"] > 0


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


def _application(settings: Settings, scale: Scale, log: LoggingConfig, actor: Any) -> serve.Application:
    gpus = int(ray.cluster_resources().get("GPU", 0))
    pool = settings.pool.between(scale.most, gpus)
    deployment = serve.deployment(
        Server,
        name=APP,
        **_size(scale),
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 / pool.sharing if gpus else 0},
        max_ongoing_requests=_NET,
        max_queued_requests=_NET,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=5),
        # A replica that the autoscaler takes away ends its requests first.
        graceful_shutdown_timeout_s=settings.seconds,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        health_check_timeout_s=30,
        logging_config=log,
        max_constructor_retry_count=1,
    )
    return deployment.bind(replace(settings, pool=pool), actor)


def _size(scale: Scale) -> dict[str, Any]:
    if scale.most <= scale.replicas:
        return {"num_replicas": scale.replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=scale.replicas,
            max_replicas=scale.most,
            metrics_interval_s=1,
            look_back_period_s=5,
            upscale_delay_s=5,
            downscale_delay_s=60,
            policy=AutoscalingPolicy(policy_function="serve_app.deployment.autoscaling:replicas_for"),
        )
    }
