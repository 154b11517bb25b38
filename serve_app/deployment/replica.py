"""One replica as Ray Serve runs it: loads the model, runs its engine under the active plan, and answers HTTP."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from transformers.utils.logging import disable_progress_bar

from baklava.cache.kernels.warmup import prepare_kernels
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan, full_cache_plan
from baklava.runtime.cpu_threads import run_on_ending_thread
from baklava.runtime.dtypes import DType
from baklava.runtime.model_loader import LoadedModel, load
from serve_app.api.metrics import Metrics
from serve_app.api.network import NO_KEYS, ApiKeys
from serve_app.api.routes import DEFAULT_REQUEST_TIMEOUT_SECONDS, RequestHandlers, create_app
from serve_app.deployment.autoscaling import LOAD_METRIC, pool_load
from serve_app.engine.chunk_size import DEFAULT_MAX_BATCHED_TOKENS, DEFAULT_PREFILL_DECODE_RATIO
from serve_app.engine.engine import Engine, EngineConfig
from serve_app.engine.memory import PoolSize, capacity_table, free_memory_bytes
from serve_app.openai.tokenization import PinnedPrefix, PromptEncoder
from serve_app.replication.coordinator import INITIAL_STATE, DesiredState
from serve_app.replication.replica_sync import ReplicaReport, ReplicaSync

APP_NAME = "baklava"

_COORDINATOR_TIMEOUT_SECONDS = 5.0
_BROADCAST_TIMEOUT_SECONDS = 5.0

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class ReplicaConfig:
    """What a replica needs to start.

    Args:
        plan: the full cache if None.
        created: Unix time at which the server started.
        max_waiting: requests that may wait in the queue.
        timeout_seconds: limit of a request, including its wait.
        host: where Serve listens.
        threads: of torch; its default if None.
        dtype: precision of the model's products, as in `load`.
    """

    model: str
    plan: BudgetPlan | None
    created: int
    pool: PoolSize
    max_waiting: int
    pinned_prefixes: tuple[PinnedPrefix, ...] = ()
    keys: ApiKeys = NO_KEYS
    timeout_seconds: float = DEFAULT_REQUEST_TIMEOUT_SECONDS
    host: str = "localhost"
    threads: int | None = None
    dtype: DType = "auto"
    prefill_decode_ratio: float = DEFAULT_PREFILL_DECODE_RATIO
    tpot_target: float | None = None
    max_batched_tokens: int = DEFAULT_MAX_BATCHED_TOKENS
    prefix_caching: bool = True


class RayReplicaGroup:
    """The replicas of this server's deployment and the coordinator actor, see `ReplicaGroup`."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def sync(self, applied: DesiredState) -> DesiredState:
        """Exchange states with the coordinator."""
        return ray.get(self._coordinator.sync.remote(applied), timeout=_COORDINATOR_TIMEOUT_SECONDS)

    def publish_plan(self, plan: str) -> DesiredState:
        """Make a plan the active one."""
        return ray.get(self._coordinator.publish_plan.remote(plan), timeout=_COORDINATOR_TIMEOUT_SECONDS)

    def drain(self) -> DesiredState:
        """Have all replicas drain, those that start later as well."""
        return ray.get(self._coordinator.drain.remote(), timeout=_COORDINATOR_TIMEOUT_SECONDS)

    def broadcast(self, desired: DesiredState | None = None) -> Sequence[ReplicaReport | BaseException]:
        """Call `BaklavaReplica.apply` on every running replica."""
        response = serve.get_deployment_handle(APP_NAME, APP_NAME).broadcast("apply", desired)
        return response.results(timeout_s=_BROADCAST_TIMEOUT_SECONDS, return_exceptions=True)


@serve.ingress()
class BaklavaReplica:
    """What Ray Serve starts, calls and ends."""

    def __init__(self, config: ReplicaConfig, coordinator: Any) -> None:
        disable_progress_bar()
        self._config = config
        self._loaded = loaded = run_on_ending_thread(lambda: _load(config))
        group = RayReplicaGroup(coordinator)
        self._engine, applied = _start_engine(loaded, config, group.sync(INITIAL_STATE))
        encoder = PromptEncoder.from_model(loaded)
        for prefix in config.pinned_prefixes:
            self._engine.pin_prefix(prefix.encode(encoder))
        name = serve.get_replica_context().replica_id.unique_id
        metrics = Metrics(loaded.identity.id, name, self._engine.state, lambda: self._engine.plan)
        self._sync = ReplicaSync(self._engine, group, name, lambda: metrics.text, applied)
        self._handlers = RequestHandlers(
            self._engine, encoder, metrics, self._sync, loaded.identity.id, config.created, config.timeout_seconds
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP application; Ray Serve calls this once the replica is up."""
        return create_app(self._handlers, self._config.keys, self._config.host)

    def apply(self, desired: DesiredState | None) -> ReplicaReport:
        """Apply the desired state, if there is one, and report; the method of `RayReplicaGroup.broadcast`."""
        return self._sync.report() if desired is None else self._sync.apply(desired)

    async def check_health(self) -> None:
        """Raise if Ray Serve should replace this replica; called every few seconds.

        A broadcast reaches only replicas that run when it is sent. This catches up with those that were missed.
        """
        if not self._engine.state().alive:
            raise RuntimeError("the engine has died")
        try:
            await asyncio.to_thread(self._sync.sync)
        except Exception:  # whatever the cluster raises; the replica itself is well
            logger.warning("the coordinator does not answer", exc_info=True, extra={"log_to_stderr": False})

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return how full this replica is, for the autoscaler."""
        state = self._engine.state()
        bytes_per_sequence = self._engine.plan.bytes_per_sequence
        return {LOAD_METRIC: pool_load(state.reserved_bytes, state.waiting, bytes_per_sequence, state.pool_bytes)}

    def describe(self) -> dict[str, Any]:
        """Return the model, the plan, the pool and how many sequences it holds, for the welcome of the server."""
        pool_bytes = self._engine.config.pool_bytes
        return {
            "model": self._handlers.model_card | {"dtype": self._loaded.dtype},
            "plan": self._handlers.plan_info,
            "pool_bytes": pool_bytes,
            "capacity": capacity_table(self._loaded, self._engine.plan, pool_bytes),
        }


def _load(config: ReplicaConfig) -> LoadedModel:
    loaded = load(config.model, dtype=config.dtype, threads=config.threads)
    if loaded.device.type == "cpu":
        prepare_kernels(loaded.geometry.head_dim, loaded.geometry.query_group)
    return loaded


def _start_engine(loaded: LoadedModel, config: ReplicaConfig, desired: DesiredState) -> tuple[Engine, DesiredState]:
    """Return an engine under the active plan, and the state that this applies."""
    pool_bytes = config.pool.resolve(free_memory_bytes(loaded.device.type == "cuda"))
    limits = EngineConfig(
        pool_bytes,
        config.max_waiting,
        config.max_batched_tokens,
        config.prefill_decode_ratio,
        config.tpot_target,
        config.prefix_caching,
    )
    if desired.version:
        try:
            engine = Engine(loaded, BudgetPlan.model_validate_json(desired.plan), limits)
        except UserError as error:
            logger.error("starts under the plan of the command line: %s", error)
        else:
            return _draining_if(engine, desired), desired
    plan = config.plan or full_cache_plan(loaded.identity, loaded.geometry, loaded.max_length)
    return _draining_if(Engine(loaded, plan, limits), desired), DesiredState(draining=desired.draining)


def _draining_if(engine: Engine, desired: DesiredState) -> Engine:
    if desired.draining:
        engine.drain()
    return engine
