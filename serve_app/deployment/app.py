"""The Ray Serve application: replicas of a model at one HTTP address."""

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from typing import Any, TextIO, cast

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig, HTTPOptions
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.schema import LoggingConfig

from baklava.console import log
from baklava.errors import UserError
from baklava.runtime.cpu_threads import available_cpus, cap_threads, max_threads
from baklava.runtime.ray_session import ray_session, starts_cluster
from serve_app.api.network import PROXY_MIDDLEWARE_PATH, PROXY_MIDDLEWARE_VARIABLE
from serve_app.deployment.replica import APP_NAME, BaklavaReplica, RayReplicaGroup, ReplicaConfig
from serve_app.openai.errors import error_summary
from serve_app.replication.coordinator import Coordinator, DesiredState
from serve_app.replication.replica_sync import ReplicaReport

OBJECT_STORE_BYTES = 128 << 20  # nothing large travels through it

# Serve's own limits are a safety net: the replica rejects first, with an error that clients can read, and /health and
# /v1/models never wait for a generation.
_MAX_ONGOING_REQUESTS = 4096
_PROXY_TIMEOUT_MARGIN_SECONDS = 30.0
_DRAIN_POLL_SECONDS = 0.25
_LOST_AFTER_POLLS = 3

_PROXY_WARNING = (
    "warning: on a cluster that was started elsewhere, Ray Serve's own pages (/-/routes, /-/healthz) need no key, "
    f"unless its nodes have {PROXY_MIDDLEWARE_VARIABLE}={PROXY_MIDDLEWARE_PATH}"
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
    if not starts_cluster():
        log(_PROXY_WARNING)
    num_cpus = max(replicas, available_cpus())
    with ray_session(object_store_bytes=OBJECT_STORE_BYTES, num_cpus=num_cpus, log_to_driver=True):
        _check_cluster(replicas)
        yield


def _check_cluster(replicas: int) -> None:
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if replicas > cpus:
        raise UserError(f"--replicas {replicas} need a CPU each, and the cluster has {cpus}; give fewer")
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
    with ExitStack() as startup:
        startup.enter_context(hold_controller_log())
        try:
            serve.start(
                http_options=HTTPOptions(host=host, port=port, request_timeout_s=timeout), logging_config=logging_config
            )
            handle = _run(_application(config, scaling, logging_config, coordinator))
            server = RunningServer(handle.describe.remote().result(), group)
            startup.close()
            try:
                yield server
            finally:
                try:
                    _drain(group, config.timeout_seconds)
                except KeyboardInterrupt:
                    log("stopping at once: requests that still run are cut off")
                    raise
                try:
                    serve.delete(APP_NAME)
                except TimeoutError:
                    log("the replicas do not end; stopping them")
        finally:
            serve.shutdown()


@contextmanager
def hold_controller_log() -> Iterator[None]:
    """Print what Ray Serve's controller logs inside the block after it, and never if it ends with a UserError.

    Its log is then the stack trace of a replica that cannot start, and stays in Ray's files.
    """
    held = _HeldLog(sys.stderr)
    try:
        with redirect_stderr(cast(TextIO, held)):
            yield
    except UserError:
        raise
    except BaseException:
        held.release()
        raise
    held.release()


class _HeldLog:
    """A stream that passes on whole lines, but keeps those of the controller, to which Ray adds its name."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._held: list[str] = []
        self._started: dict[int, str] = {}  # the line that a thread has begun

    def write(self, text: str) -> None:
        line = self._started.pop(threading.get_ident(), "") + text
        if not line.endswith("\n"):
            self._started[threading.get_ident()] = line
        elif "(ServeController " in line:
            self._held.append(line)
        else:
            self._stream.write(line)

    def release(self) -> None:
        self._stream.write("".join([*self._held, *self._started.values()]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _drain(group: RayReplicaGroup, timeout_seconds: float) -> None:
    """Reject new requests with 503 and wait for running ones, up to the time limit of a request.

    A replica is lost once it has missed several polls in a row. A poll that fails as a whole says nothing about any.
    """
    deadline = time.monotonic() + timeout_seconds
    is_busy: dict[str, bool] = {}
    missed_polls: dict[str, int] = {}
    polls_with_unknown = 0  # in a row, with replicas that never answered
    desired: DesiredState | None = None
    answers: Sequence[ReplicaReport | BaseException] | None
    has_logged = False
    while True:
        try:
            desired = desired or group.drain()
            answers = group.broadcast(desired)
        except DeploymentUnavailableError:
            answers = []  # no replica runs
        except Exception as error:  # whatever the cluster raises
            answers = None
            if not has_logged:
                log(
                    f"the replicas do not answer, waiting for them: {error_summary(error)}; if the signal went to them "
                    "as well, as systemd sends it without KillMode=mixed, their requests may be cut off"
                )
            has_logged = True
        if answers is not None:
            reports = {answer.replica: answer for answer in answers if isinstance(answer, ReplicaReport)}
            for name, report in reports.items():
                state = report.state
                is_busy[name] = bool(state["running"] or state["waiting"] or not state["draining"])
            missed_polls = {name: 0 if name in reports else missed_polls.get(name, 0) + 1 for name in is_busy}
            num_silent = len(answers) - len(reports)
            has_unknown = num_silent > sum(missed > 0 for missed in missed_polls.values())
            polls_with_unknown = polls_with_unknown + 1 if has_unknown else 0
            waits_for_known = any(is_busy[name] and missed < _LOST_AFTER_POLLS for name, missed in missed_polls.items())
            if not waits_for_known and not 0 < polls_with_unknown < _LOST_AFTER_POLLS:
                return
        if time.monotonic() >= deadline:
            log("requests still run at their time limit; stopping them")
            return
        time.sleep(_DRAIN_POLL_SECONDS)


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
    return deployment.bind(replace(config, pool=pool, threads=_threads(scaling.max_replicas)), coordinator)


def _threads(replicas: int) -> int:
    """Return the threads of a replica, so that all of them fit on the cores of the cluster."""
    cores = (int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    return cap_threads(max_threads([(count, count) for count in cores], replicas) or 1)
