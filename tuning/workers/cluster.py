"""The Ray cluster that a search runs on: the one it is sent to, or one of this machine's own."""

import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any, Self

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from baklava.console import log, progress_bar
from baklava.data.windows import Window
from baklava.errors import UserError
from tuning.study.search_space import SearchTask
from tuning.study.trial import TrialRecord
from tuning.workers.scheduler import WorkerScheduler, error_summary
from tuning.workers.scoring_worker import ScoringWorker

MOST_CPU_REPLICAS = 4
"""More copies of a model than this rarely pay on one machine's memory bandwidth."""

TRIAL_CPUS = 0.01
"""What a trial asks for: it only waits for replicas."""

SPARE_CPUS = 0.1
"""What a replica leaves of its CPUs, so that trials always find room."""

OBJECT_STORE_BYTES = 256 << 20  # only windows of token ids and plans travel through it


@dataclass(frozen=True)
class WorkerLayout:
    """How many replicas, with how many torch threads and GPUs each, and the most that one node may hold."""

    replicas: int
    threads: int
    gpus: int = 0
    most_per_node: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """Ray's options of one replica. A killed one restarts for ever, its task is for the pool to send elsewhere.

        Replicas are spread over the nodes: on one they would share its memory bandwidth.
        """
        kind = {"max_restarts": -1, "max_task_retries": 0, "scheduling_strategy": "SPREAD"}
        return {**kind, "num_cpus": self.threads - SPARE_CPUS, "num_gpus": self.gpus}

    @property
    def host_share(self) -> float:
        """Part of a node's memory that each replica may keep windows in: half of it, for all of them together."""
        return 0.5 / self.most_per_node


@contextmanager
def session() -> Iterator[None]:
    """A connection to the cluster at `$RAY_ADDRESS`, else to one started here for as long as the block lasts."""
    if ray.is_initialized():
        yield
        return
    _connect(os.environ.get("RAY_ADDRESS"))
    try:
        yield
    finally:
        ray.shutdown()


def _connect(address: str | None) -> None:
    log(f"ray: {f'connecting to {address}' if address else 'starting on this machine'}")
    if not address:
        # "local", since a bare init would join whatever cluster was last started on this machine.
        own = {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        ray.init(log_to_driver=False, logging_level="ERROR", **own)
        return
    try:
        if re.fullmatch(r"[\w.-]+:\d+", address):
            # Ray itself would ask for minutes.
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RayError) as error:
        raise UserError(f"no Ray cluster answers at {address} ({error}); check RAY_ADDRESS and the token") from error


def plan_layout(nodes: Sequence[Mapping[str, float]], asked: int | str, gpus: int = 1) -> WorkerLayout:
    """The fleet for a cluster's nodes, each given by its resources; a replica takes `gpus` of one node, if it has any.

    "auto" is as many replicas as the GPUs are enough for, else one per CPU, up to four a node. Threads are as many as
    still fit.

    Raises:
        UserError: the nodes do not hold that many replicas.
    """
    present = sum(int(node.get("GPU", 0)) for node in nodes)
    each = gpus if present or gpus > 1 else 0
    kind = "GPU" if each else "CPU"
    slots = [(int(node.get("CPU", 0)), int(node.get(kind, 0)) // (each or 1)) for node in nodes]
    usual = sum(min(slot, slot if each else MOST_CPU_REPLICAS) for _, slot in slots)
    replicas = usual if asked == "auto" else int(asked)
    fitting = [
        threads
        for threads in range(1, max(cpus for cpus, _ in slots) + 1)
        if sum(min(cpus // threads, slot) for cpus, slot in slots) >= replicas > 0
    ]
    if not fitting:
        raise UserError(_too_many(asked, sum(int(node.get(kind, 0)) for node in nodes), kind, each or 1))
    return WorkerLayout(replicas, max(fitting), each, max(1, *(slot for _, slot in slots)))


def _too_many(asked: int | str, present: int, kind: str, each: int) -> str:
    share = f"{each} {kind}s of one node for each" if each > 1 else "one replica each"
    return f"--replicas {asked} does not fit on {present} {kind}s, {share}; ask for fewer, or for auto"


def cluster_layout(asked: int | str, gpus: int = 1) -> WorkerLayout:
    """The fleet for the nodes that the connected cluster has now."""
    return plan_layout([node["Resources"] for node in ray.nodes() if node["Alive"]], asked, gpus)


class WorkerGroup:
    """The running replicas and the pool before them; `score` is all that a trial needs of it."""

    def __init__(self, actors: Sequence[Any], windows: Sequence[Window], task: SearchTask) -> None:
        self.actors = list(actors)
        self.windows = {window.name: ray.put(window) for window in windows}
        # Beside the search itself, so that no other node's death takes the pool along.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.pool = (
            ray.remote(WorkerScheduler).options(num_cpus=0, scheduling_strategy=here).remote(self.actors, self.windows, task)
        )

    @classmethod
    def of(cls, model: str, fleet: WorkerLayout, windows: Sequence[Window], task: SearchTask, memory: float | None = None) -> Self:
        """A crew of a fleet's replicas, which keep at most `memory` GiB of windows each beside the model."""
        replica = ray.remote(ScoringWorker).options(**fleet.options)
        kept = {"memory": memory, "host_share": fleet.host_share}
        kind = {"spread": fleet.gpus > 1, "timed": task.goal.latency, **kept}
        return cls([replica.remote(model, fleet.threads, **kind) for _ in range(fleet.replicas)], windows, task)

    def start(self) -> None:
        """Wait until every replica has the model in memory."""
        try:
            _count([actor.ready.remote() for actor in self.actors], "starting replicas", "replicas")
        except RayActorError as death:
            raise UserError(
                f"a replica cannot start ({error_summary(death)}); its machine needs the model and memory"
            ) from death

    def hold(self, windows: Sequence[str]) -> None:
        """Prefill these windows, shared out over the replicas, and free all others.

        Raises:
            UserError: the model does not take one of them.
        """
        self._prefill(ray.get(self.pool.assign.remote(windows)))

    @contextmanager
    def holding(self, windows: Sequence[str], failed: Callable[[UserError], None]) -> Iterator[None]:
        """The same beside what the block does, which waits only for what it needs; at its end all are held.

        `failed` is told at once of a window that the model does not take.
        """
        pairs, left = ray.get(self.pool.assign.remote(windows)), Event()

        def prefill() -> None:
            try:
                self._prefill(pairs, left)
            except UserError as error:
                failed(error)
            except RayError:
                pass  # the cluster is gone, which the block finds out by itself

        thread = Thread(target=prefill, name="prefilling", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            left.set()
            raise
        finally:
            thread.join()

    def _prefill(self, pairs: Sequence[tuple[int, str]], left: Event | None = None) -> None:
        for failed in _ended([self.pool.warm.remote(*pair) for pair in pairs], "prefilling", "windows", left):
            if failed:
                raise UserError(f"a window cannot be prefilled ({failed}); try another model or shorter windows")
        if left and left.is_set():
            return
        for sentence in ray.get(self.pool.kept.remote()):
            log(sentence)

    def recall(self, records: Sequence[TrialRecord]) -> None:
        """Take in what was scored before, so that it is not scored again."""
        ray.get(self.pool.recall.remote([(record.params, record.windows) for record in records if record.windows]))

    def scores(self, tasks: Sequence[tuple[str, str]], label: str) -> list[dict[str, Any]]:
        """Scores of (plan as JSON, window) tasks, in their order."""
        return _count([self.pool.score.remote(*task) for task in tasks], label, "scores")

    def tell(self) -> None:
        """Say what happened to replicas since the last call."""
        for sentence in ray.get(self.pool.tell.remote()):
            log(sentence)


def _count(refs: list[Any], label: str, unit: str) -> list[Any]:
    for _ in _ended(refs, label, unit):
        pass
    return ray.get(refs)


def _ended(refs: Sequence[Any], label: str, unit: str, left: Event | None = None) -> Iterator[Any]:
    """Results as they come, counted on the screen, until nobody waits for them any more."""
    waiting = list(refs)
    with progress_bar(len(waiting), label, unit) as progress:
        while waiting and not (left and left.is_set()):
            done, waiting = ray.wait(waiting, num_returns=1, timeout=None if left is None else 0.5)
            for result in ray.get(done):
                progress.update(1)
                yield result
