"""A group of workers on a Ray cluster, each with a replica of the model; the search and the evaluation use it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from threading import Event, Thread
from typing import Any, Self

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from baklava.console import log, progress_bar
from baklava.data.windows import Window
from baklava.errors import UserError
from baklava.runtime.cpu_threads import cap_threads, max_threads
from tuning.study.search_space import SearchTask
from tuning.study.trial import TrialRecord
from tuning.workers.scheduler import WorkerScheduler, error_summary
from tuning.workers.scoring_worker import ModelWorker, ScoringWorker

MAX_CPU_WORKERS_PER_NODE = 4
"""More copies of a model than this rarely pay on one machine's memory bandwidth."""

TRIAL_CPUS = 0.01
"""What a trial reserves: it only waits for workers."""

SPARE_CPUS = 0.1
"""What a worker leaves of its CPUs, so that trials always fit."""

ITEMS_IN_FLIGHT_PER_WORKER = 2
"""One that runs and one that waits, so that no worker is idle between two items."""

OBJECT_STORE_BYTES = 256 << 20  # only windows of token ids and plans travel through it


@dataclass(frozen=True)
class WorkerLayout:
    """How many workers, with how many torch threads and GPUs each, and the most on one node."""

    replicas: int
    threads: int
    gpus: int = 0
    max_per_node: int = 1

    @property
    def actor_options(self) -> dict[str, Any]:
        """Ray's options of one worker. A dead one restarts without limit; the scheduler sends its task elsewhere.

        Workers are spread over the nodes: on one they would share its memory bandwidth.
        """
        return {
            "max_restarts": -1,
            "max_task_retries": 0,
            "scheduling_strategy": "SPREAD",
            "num_cpus": self.threads - SPARE_CPUS,
            "num_gpus": self.gpus,
        }

    @property
    def host_share(self) -> float:
        """Share of a node's memory for one worker's windows: half of the memory for all workers together."""
        return 0.5 / self.max_per_node


def plan_layout(nodes: Sequence[Mapping[str, float]], replicas: int | str, gpus_per_replica: int = 1) -> WorkerLayout:
    """Return the layout for a cluster.

    Args:
        nodes: The resources of each node.
        replicas: Number of workers; "auto" is as many as the GPUs suffice for, else one per CPU, up to four a node.
        gpus_per_replica: GPUs of one node that a worker takes, if the cluster has any.

    Raises:
        UserError: that many workers do not fit.
    """
    has_gpus = any(int(node.get("GPU", 0)) for node in nodes)
    gpus = gpus_per_replica if has_gpus or gpus_per_replica > 1 else 0
    kind = "GPU" if gpus else "CPU"
    # Per node: its CPUs, and the workers that its GPUs (or CPUs) allow.
    slots = [(int(node.get("CPU", 0)), int(node.get(kind, 0)) // (gpus or 1)) for node in nodes]
    if replicas == "auto":
        count = sum(slot if gpus else min(slot, MAX_CPU_WORKERS_PER_NODE) for _, slot in slots)
    else:
        count = int(replicas)
    threads = max_threads(slots, count)
    if not threads:
        present = sum(int(node.get(kind, 0)) for node in nodes)
        share = f"{gpus} {kind}s of one node for each" if gpus > 1 else "one replica each"
        raise UserError(f"--replicas {replicas} does not fit on {present} {kind}s, {share}; ask for fewer, or for auto")
    return WorkerLayout(count, threads, gpus, max(1, *(slot for _, slot in slots)))


def cluster_layout(replicas: int | str, gpus_per_replica: int = 1) -> WorkerLayout:
    """Return the layout for the nodes that the connected cluster has now, with at most `$OMP_NUM_THREADS` threads.

    Raises like `plan_layout`.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    layout = plan_layout(nodes, replicas, gpus_per_replica)
    return replace(layout, threads=cap_threads(layout.threads))


class WorkerGroup:
    """Workers and their scheduler, which end with a `with` block, so that others find their CPUs and GPUs free.

    Args:
        actors: The workers' actor handles.
        windows: The windows of a search.
        task: The task of a search; trials need only the `scheduler` to have plans made and scored.
    """

    def __init__(self, actors: Sequence[Any], windows: Sequence[Window] = (), task: SearchTask | None = None) -> None:
        self.actors = list(actors)
        references = {window.name: ray.put(window) for window in windows}
        # On this node, so that the death of another one does not take the scheduler along.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote_class = ray.remote(WorkerScheduler).options(num_cpus=0, scheduling_strategy=here)
        self.scheduler = remote_class.remote(self.actors, references, task)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for actor in (self.scheduler, *self.actors):
            with suppress(Exception):  # the cluster is gone, and the actors with it; how the block ended matters more
                ray.kill(actor)

    @classmethod
    def launch(
        cls,
        layout: WorkerLayout,
        worker_class: type[ModelWorker],
        model: str,
        *,
        windows: Sequence[Window] = (),
        task: SearchTask | None = None,
        **options: Any,
    ) -> Self:
        """Start the workers of a layout; `options` go to the constructor of their class."""
        remote_class = ray.remote(worker_class).options(**layout.actor_options)
        options["device_map_auto"] = layout.gpus > 1
        actors = [remote_class.remote(model, layout.threads, **options) for _ in range(layout.replicas)]
        return cls(actors, windows, task)

    @classmethod
    def for_search(
        cls,
        model: str,
        layout: WorkerLayout,
        windows: Sequence[Window],
        task: SearchTask,
        memory: float | None = None,
        dtype: str | None = None,
        weights_digest: str | None = None,
    ) -> Self:
        """Start the workers of a search, each with at most `memory` GiB of windows next to the model."""
        return cls.launch(
            layout,
            ScoringWorker,
            model,
            windows=windows,
            task=task,
            memory=memory,
            host_share=layout.host_share,
            timed=task.goal.latency,
            dtype=dtype,
            weights_digest=weights_digest,
        )

    def wait_until_ready(self) -> None:
        """Wait until every worker has loaded the model.

        Raises:
            UserError: a worker cannot start.
        """
        try:
            for _ in _completed([actor.ping.remote() for actor in self.actors], "starting replicas", "replicas"):
                pass
        except RayActorError as death:
            raise UserError(
                f"a replica cannot start ({error_summary(death)}); its machine needs the model and memory"
            ) from death

    def prefill(self, windows: Sequence[str]) -> None:
        """Prefill these windows, distributed over the workers, and release all others.

        Raises:
            UserError: the model does not accept one of them.
        """
        self._prefill(ray.get(self.scheduler.assign.remote(windows)))

    @contextmanager
    def prefilling(self, windows: Sequence[str], on_error: Callable[[UserError], None]) -> Iterator[None]:
        """Prefill these windows while the block runs, which waits only for those it needs; at its end all are there.

        `on_error` is called at once if the model does not accept a window.
        """
        pairs = ray.get(self.scheduler.assign.remote(windows))
        cancelled = Event()

        def prefill() -> None:
            try:
                self._prefill(pairs, cancelled)
            except UserError as error:
                on_error(error)
            except RayError:
                pass  # the cluster is gone, which the block finds out by itself

        thread = Thread(target=prefill, name="prefilling", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            cancelled.set()
            raise
        finally:
            thread.join()

    def preload_scores(self, records: Sequence[TrialRecord]) -> None:
        """Take over recorded scores, so that they are not computed again."""
        scored = [(record.params, record.windows) for record in records if record.windows]
        ray.get(self.scheduler.preload_scores.remote(scored))

    def scores(self, tasks: Sequence[tuple[str, str]], label: str) -> list[dict[str, Any]]:
        """Return the scores of (plan as JSON, window) tasks, in their order."""
        references = [self.scheduler.score.remote(*task) for task in tasks]
        for _ in _completed(references, label, "scores"):
            pass
        self.report_events()
        return ray.get(references)

    def map_unordered(self, method: str, items: Iterable[Any]) -> Iterator[Any]:
        """Yield the results of a worker's method on all items, as they come.

        Items are submitted only as results come, so that many of them fill neither the object store nor the scheduler.

        Raises:
            UserError: an item failed.
        """
        remaining = iter(items)
        max_in_flight = ITEMS_IN_FLIGHT_PER_WORKER * len(self.actors)
        in_flight: list[Any] = []
        while True:
            for item in islice(remaining, max_in_flight - len(in_flight)):
                in_flight.append(self.scheduler.run.remote(method, [ray.put(item)]))
            if not in_flight:
                return
            done, in_flight = ray.wait(in_flight, num_returns=1)
            outcome = ray.get(done[0])
            self.report_events()
            if "error" in outcome:
                raise UserError(f"a replica failed ({outcome['error']}); fix the cause, or use --replicas 1")
            yield outcome["result"]

    def report_events(self) -> None:
        """Log what happened to workers since the last call."""
        for event in ray.get(self.scheduler.take_events.remote()):
            log(event)

    def _prefill(self, pairs: Sequence[tuple[int, str]], cancelled: Event | None = None) -> None:
        references = [self.scheduler.prefill.remote(*pair) for pair in pairs]
        for reason in _completed(references, "prefilling", "windows", cancelled):
            if reason:
                self.report_events()
                raise UserError(f"a window cannot be prefilled ({reason}); try another model or shorter windows")
        if cancelled and cancelled.is_set():
            return
        for sentence in ray.get(self.scheduler.status.remote()):
            log(sentence)


def _completed(references: Sequence[Any], label: str, unit: str, cancelled: Event | None = None) -> Iterator[Any]:
    """Yield results as they come, with a progress bar, until `cancelled` is set."""
    waiting = list(references)
    with progress_bar(len(waiting), label, unit) as progress:
        while waiting and not (cancelled and cancelled.is_set()):
            done, waiting = ray.wait(waiting, num_returns=1, timeout=None if cancelled is None else 0.5)
            for result in ray.get(done):
                progress.update(1)
                yield result
