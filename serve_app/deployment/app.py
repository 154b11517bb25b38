"""The Ray Serve application: replicas of a model behind one HTTP address."""

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig, HTTPOptions
from ray.serve.schema import LoggingConfig

from baklava.console import log
from baklava.errors import UserError
from baklava.runtime.ray_session import ray_session
from serve_app.api import proxy_middleware
from serve_app.deployment.replica import APP_NAME, BaklavaReplica, RayReplicaGroup, ReplicaConfig
from serve_app.replication.coordinator import Coordinator
from serve_app.replication.replica_sync import ReplicaReport

OBJECT_STORE_BYTES = 128 << 20  # nothing large travels through it

# Serve's own limits are a safety net: the replica rejects first, with an error that clients can read, and /health and
# /v1/models never wait for a generation.
_MAX_ONGOING_REQUESTS = 4096
_PROXY_TIMEOUT_MARGIN_SECONDS = 30.0
_DRAIN_POLL_SECONDS = 0.25

_PROXY_WARNING = (
    "warning: on a cluster that was started elsewhere, Ray Serve's own pages (/-/routes, /-/healthz) need no key, "
    f"unless its nodes have {proxy_middleware.IMPORT_PATH_VARIABLE}={proxy_middleware.IMPORT_PATH}"
)


@dataclass(frozen=True)
class ScalingConfig:
    """Replicas at the start and at most, and the folder for their logs."""

    num_replicas: int = 1
    max_replicas: int = 1
    log_dir: str | None = None


@contextmanager
def serving_session(replicas: int, *, quiet: bool = False) -> Iterator[None]:
    """Connect to the cluster at `$RAY_ADDRESS`, or start one on this machine that ends with the block.

    With `quiet`, Serve logs to files only.

    Raises:
        UserError: no cluster answers, it is too small, or it serves something already.
    """
    if quiet:
        os.environ["RAY_SERVE_LOG_TO_STDERR"] = "0"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if os.environ.get("RAY_ADDRESS"):
        log(_PROXY_WARNING)
    num_cpus = max(replicas, os.cpu_count() or 1)
    with ray_session(object_store_bytes=OBJECT_STORE_BYTES, num_cpus=num_cpus, log_to_driver=True):
        _check_cluster(replicas)
        yield


def _check_cluster(replicas: int) -> None:
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if replicas > cpus:
        raise UserError(f"--replicas {replicas} need a CPU each, and the cluster has {cpus}; ask for fewer")
    if serve.status().proxies:
        raise UserError("Ray Serve already runs on this cluster; end it with `serve shutdown`, or use another cluster")


@dataclass(frozen=True)
class RunningServer:
    """A server that is up: how a replica describes itself, and all replicas."""

    description: dict[str, Any]
    group: RayReplicaGroup


@contextmanager
def run_server(config: ReplicaConfig, host: str, port: int, scaling: ScalingConfig) -> Iterator[RunningServer]:
    """Serve for the length of the block. Yields once all replicas are ready; drains at the end.

    Raises:
        UserError: the model cannot be loaded, the plan is not for it, or the pool does not hold one sequence.
    """
    logging_config = LoggingConfig(
        log_level="INFO" if scaling.log_dir else "WARNING",
        encoding="JSON" if scaling.log_dir else "TEXT",
        logs_dir=scaling.log_dir,
        enable_access_log=False,
    )
    timeout = config.timeout_seconds + _PROXY_TIMEOUT_MARGIN_SECONDS
    coordinator = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Coordinator).remote()
    group = RayReplicaGroup(coordinator)
    try:
        serve.start(
            http_options=HTTPOptions(host=host, port=port, request_timeout_s=timeout), logging_config=logging_config
        )
        handle = _run(_application(config, scaling, logging_config, coordinator))
        server = RunningServer(handle.describe.remote().result(), group)
        try:
            yield server
        finally:
            _drain(group, config.timeout_seconds)
            serve.delete(APP_NAME)
    finally:
        serve.shutdown()


def _drain(group: RayReplicaGroup, timeout_seconds: float) -> None:
    """Reject new requests with 503 and wait for running ones, at most as long as a request may take."""
    deadline = time.monotonic() + timeout_seconds
    try:
        reports = group.broadcast(group.drain())
        while time.monotonic() < deadline and any(_has_work(report) for report in reports):
            time.sleep(_DRAIN_POLL_SECONDS)
            reports = group.broadcast()
    except Exception as error:  # whatever the cluster raises, the server ends
        log(f"cannot wait for running requests: {error}")


def _has_work(report: ReplicaReport | BaseException) -> bool:
    if isinstance(report, BaseException):  # it is lost or does not answer, so nobody waits for it
        return False
    return report.state["running"] > 0 or report.state["waiting"] > 0


def _run(application: serve.Application) -> Any:
    try:
        return serve.run(application, name=APP_NAME, route_prefix="/")
    except RuntimeError:
        # Serve keeps what a replica raised only as the text of its stack trace.
        trace = serve.status().applications[APP_NAME].deployments[APP_NAME].message
        sentence = re.search(rf"{UserError.__name__}: (.+)", trace)
        if sentence is None:
            raise
        raise UserError(sentence[1]) from None


def _application(
    config: ReplicaConfig, scaling: ScalingConfig, logging_config: LoggingConfig, coordinator: Any
) -> serve.Application:
    gpus = int(ray.cluster_resources().get("GPU", 0))
    pool = config.pool.shared_by(scaling.max_replicas, gpus)
    size: dict[str, Any] = {"num_replicas": scaling.num_replicas}
    if scaling.max_replicas > scaling.num_replicas:
        size = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=scaling.num_replicas,
                max_replicas=scaling.max_replicas,
                metrics_interval_s=1,
                look_back_period_s=5,
                upscale_delay_s=5,
                downscale_delay_s=60,
                policy=AutoscalingPolicy(policy_function="serve_app.deployment.autoscaling:target_replicas"),
            )
        }
    deployment = serve.deployment(
        BaklavaReplica,
        name=APP_NAME,
        **size,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 / pool.replicas_per_device if gpus else 0},
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        max_queued_requests=_MAX_ONGOING_REQUESTS,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=5),
        # A replica that the autoscaler takes away finishes its requests first.
        graceful_shutdown_timeout_s=config.timeout_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        health_check_timeout_s=30,
        logging_config=logging_config,
        max_constructor_retry_count=1,
    )
    return deployment.bind(replace(config, pool=pool), coordinator)
