"""The scheduler: sends each task to a worker that has its window, and survives the death of any worker."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import lcm
from typing import Any

from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from baklava.errors import UserError

MAX_DEATHS_PER_TASK = 4
"""Worker deaths during one task after which the task is taken for their cause."""

RECOVERY_POLL_SECONDS = 1.0
MAX_DEATHS_IN_RECOVERY = 5
"""Deaths in a row, without an answer in between, after which a worker is given up."""


def assign_windows(num_workers: int, windows: Sequence[str]) -> list[set[str]]:
    """Return the windows that each worker prefills: every window somewhere, and equally many per worker."""
    assigned: list[set[str]] = [set() for _ in range(num_workers)]
    for step in range(lcm(num_workers, len(windows)) if windows else 0):
        assigned[step % num_workers].add(windows[step % len(windows)])
    return assigned


def error_summary(error: Exception) -> str:
    """Return a remote error in one line: the message of a UserError, or the last line of the traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):
        return str(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@dataclass
class WorkerState:
    """What the scheduler knows of one worker.

    `lost` is the reason why it will not come back, `status` its last message about windows that are not on its device.
    """

    index: int
    actor: Any
    is_alive: bool = True
    is_busy: bool = False
    assigned: set[str] = field(default_factory=set)
    prefilled: set[str] = field(default_factory=set)
    lost: str | None = None
    status: str | None = None
    prefill_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        """The worker's name in messages."""
        return f"replica {self.index + 1}"


class WorkerScheduler:
    """Gives tasks to idle workers, one at a time each. Runs as an async Ray actor without CPUs of its own.

    A task on a window goes to a living worker that has the window, or waits for one; if none lives, any idle worker
    takes it over. No plan is scored twice on a window; plans with equal JSON are the same, even if their parameters
    differ.

    Args:
        actors: The workers' actor handles.
        windows: Object references of the windows by name: Ray copies each to a worker's machine once.
        task: The `SearchTask` that makes plans; its import would load torch into the processes of the trials.
    """

    def __init__(self, actors: Sequence[Any], windows: Mapping[str, Any], task: Any) -> None:
        self.workers = [WorkerState(index, actor) for index, actor in enumerate(actors)]
        self.windows = windows
        self.task = task
        self.plans: dict[str, str] = {}
        self.scores: dict[tuple[str, str], asyncio.Task[dict[str, Any]]] = {}
        self.changed = asyncio.Condition()
        self.recoveries: set[asyncio.Task[None]] = set()
        self.events: list[str] = []
        self.tracebacks: set[str] = set()

    async def assign(self, windows: Sequence[str]) -> list[tuple[int, str]]:
        """Assign these windows to the workers and release all others; return the (worker, window) pairs to prefill."""
        assignments = assign_windows(len(self.workers), windows)
        for worker, assigned in zip(self.workers, assignments, strict=True):
            worker.assigned = assigned
            stale = worker.prefilled - assigned
            worker.prefilled -= stale
            if stale and worker.is_alive:
                worker.actor.release.remote(tuple(stale))
        return [(worker.index, window) for window in windows for worker in self.workers if window in worker.assigned]

    async def prefill(self, index: int, window: str) -> str | None:
        """Prefill a window on one worker; return why that failed, which a score would meet as well.

        A worker prefills one window at a time: plans to be scored would wait for all that are sent at once.
        """
        worker = self.workers[index]
        try:
            async with worker.prefill_lock:
                await worker.actor.prefill.remote(self.windows[window])
        except RayActorError:
            await self._mark_dead(worker)
        except RayError as error:
            self._report_traceback(worker, _unexpected_traceback(error))
            return error_summary(error)
        else:
            async with self.changed:
                worker.prefilled.add(window)
                self.changed.notify_all()
        return None

    async def plan(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return the plan of a trial as {"json", "size"}, or {"error"} if it does not fit into the budget."""
        try:
            plan = self.task.plan(params)
        except UserError as error:
            return {"error": str(error)}
        return {
            "json": self.plans.setdefault(plan.digest, plan.model_dump_json()),
            "size": {"ratio": plan.ratio, "bytes_per_sequence": plan.bytes_per_sequence},
        }

    async def preload_scores(self, trials: Sequence[tuple[dict[str, Any], Sequence[dict[str, Any]]]]) -> None:
        """Take over recorded scores; each trial is its parameters and the scores of its windows."""
        for params, scores in trials:
            plan = await self.plan(params)
            for score in scores if "json" in plan else ():
                known = asyncio.create_task(asyncio.sleep(0, result=score))
                self.scores[plan["json"], score["window"]] = known

    async def score(self, plan_json: str, window: str) -> dict[str, Any]:
        """Return the scores of a plan on a window, or {"error": reason}; never score the same twice."""
        key = (plan_json, window)
        if key not in self.scores:
            self.scores[key] = asyncio.create_task(self._score(plan_json, window))
        return await asyncio.shield(self.scores[key])  # if the first caller gives up, others still wait for it

    async def run(self, method: str, argument: Sequence[Any]) -> dict[str, Any]:
        """Run a method on any idle worker; return {"result"} or {"error": reason}.

        `argument` is a list with the reference of the method's only argument: Ray would resolve a bare reference here.
        """
        _, outcome = await self._run_on_worker(method, *argument)
        return outcome

    async def status(self) -> list[str]:
        """Return which workers do not store all their windows on their device, as sentences."""
        sentences = []
        for worker in self.workers:
            with suppress(RayError):
                worker.status = await worker.actor.status.remote() if worker.is_alive else None
                sentences += [f"{worker.name} {worker.status}"] if worker.status else []
        return sentences

    async def take_events(self) -> list[str]:
        """Return what happened to workers since the last call, as sentences."""
        events, self.events = self.events, []
        return events

    async def _score(self, plan_json: str, window: str) -> dict[str, Any]:
        worker, outcome = await self._run_on_worker("score", plan_json, self.windows[window], window=window)
        score: dict[str, Any] = outcome.get("result", outcome)
        if worker and "result" in outcome:
            self._report_traceback(worker, score.pop("traceback", None))
            status = score.pop("status", None)
            if status and status != worker.status:
                self.events.append(f"{worker.name} {status}")
            worker.status = status
        return score

    async def _run_on_worker(
        self, method: str, *arguments: Any, window: str | None = None
    ) -> tuple[WorkerState | None, dict[str, Any]]:
        """Run a method on a worker, and on another one if it dies; return the worker and {"result"} or {"error"}."""
        for _ in range(MAX_DEATHS_PER_TASK):
            worker = await self._acquire(window)
            if worker is None:
                reasons = "; ".join(worker.lost for worker in self.workers if worker.lost)
                return None, {"error": f"no replica is left: {reasons}"}
            try:
                result = await getattr(worker.actor, method).remote(*arguments)
            except RayActorError:
                await self._mark_dead(worker)
            except RayError as error:
                self._report_traceback(worker, _unexpected_traceback(error))
                await self._release(worker)
                return worker, {"error": error_summary(error)}
            else:
                await self._release(worker, window)
                return worker, {"result": result}
        on_window = f" on window {window}" if window else ""
        return None, {"error": f"{MAX_DEATHS_PER_TASK} replicas died during this task{on_window}"}

    async def _acquire(self, window: str | None) -> WorkerState | None:
        """Wait for an idle worker that suits the window and mark it busy; return None if all workers are lost."""
        async with self.changed:
            await self.changed.wait_for(
                lambda: self._idle_worker(window) or all(worker.lost for worker in self.workers)
            )
            worker = self._idle_worker(window)
            if worker is not None:
                worker.is_busy = True
            return worker

    def _idle_worker(self, window: str | None) -> WorkerState | None:
        alive = [worker for worker in self.workers if worker.is_alive]
        holders = [worker for worker in alive if window in worker.prefilled]
        # If a window is about to be prefilled, waiting for it costs less than prefilling it elsewhere as well.
        assigned = [worker for worker in alive if window in worker.assigned]
        return next((worker for worker in holders or assigned or alive if not worker.is_busy), None)

    async def _release(self, worker: WorkerState, prefilled: str | None = None) -> None:
        async with self.changed:
            worker.is_busy = False
            if prefilled:
                worker.prefilled.add(prefilled)
            self.changed.notify_all()

    async def _mark_dead(self, worker: WorkerState) -> None:
        async with self.changed:
            worker.is_busy = False
            if worker.is_alive:
                worker.is_alive = False
                worker.prefilled.clear()
                self.events.append(f"{worker.name} died; its work goes to the others until it is back")
                recovery = asyncio.create_task(self._recover(worker))
                self.recoveries.add(recovery)  # the event loop has only weak references to tasks
                recovery.add_done_callback(self.recoveries.discard)
            self.changed.notify_all()

    async def _recover(self, worker: WorkerState) -> None:
        """Wait until Ray has started the worker again and return it to service, or give it up."""
        deaths, reason = 0, ""
        while deaths < MAX_DEATHS_IN_RECOVERY:
            answered = False
            try:
                await worker.actor.ping.remote()
                answered = True
                return await self._restore(worker)
            except RayError as error:
                # Silence alone is not a death: a model may take minutes to load, a cluster to find a new node.
                if answered or not isinstance(error, RayActorError) or isinstance(error, ActorDiedError):
                    deaths, reason = deaths + 1, error_summary(error)
            await asyncio.sleep(RECOVERY_POLL_SECONDS)
        async with self.changed:
            worker.lost = f"{worker.name}: {reason}"
            self.events.append(f"{worker.lost}; it is not started again")
            self.changed.notify_all()

    async def _restore(self, worker: WorkerState) -> None:
        # Without its windows, a worker would stay idle: the others have them all by now.
        for window in sorted(worker.assigned):
            with suppress(RayTaskError):  # a window that cannot be prefilled is an error of the trial that needs it
                await worker.actor.prefill.remote(self.windows[window])
                worker.prefilled.add(window)
        async with self.changed:
            worker.is_alive = True
            self.events.append(f"{worker.name} is back")
            self.changed.notify_all()

    def _report_traceback(self, worker: WorkerState, traceback: str | None) -> None:
        if traceback and traceback not in self.tracebacks:  # a bug would repeat itself with every trial
            self.tracebacks.add(traceback)
            self.events.append(f"{worker.name} failed:\n{traceback.rstrip()}")


def _unexpected_traceback(error: Exception) -> str | None:
    """The remote traceback of an error that is not the user's, without Ray's colours."""
    if isinstance(getattr(error, "cause", None), UserError):
        return None
    return re.sub(r"\x1b\[\d+m", "", str(error))
