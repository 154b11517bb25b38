"""Score plans on a window: one prefill of the window, then one row per plan."""

import hashlib
import multiprocessing
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

from baklava.data.windows import Window
from baklava.evaluation.evaluator import context_gain
from baklava.evaluation.window_scoring import prefill_window, score_plan
from baklava.eviction import build_eviction
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.cpu_threads import available_cpus, cap_threads
from baklava.runtime.model_loader import LoadedModel, load
from baklava.serialization import FrozenModel


class Row(FrozenModel):
    """The scores of a plan on a window; NLLs, KL and gain are in nats per token.

    Attributes:
        run: digest of the weights and the window's token ids.
        plan: the plan's digest.
        gain: how much the context lowers the full cache's NLL.
        code: the commit that scored the row.
    """

    run: str
    plan: str
    window: str
    nll_full: float
    nll: float
    kl: float
    gain: float
    allocated_bytes: int
    seconds: float
    code: str

    @property
    def key(self) -> tuple[str, str]:
        """What identifies a score; the same key is never scored twice."""
        return self.run, self.plan


def run_digest(weights: str, window: Window) -> str:
    """Return a digest of these weights and this window."""
    return hashlib.sha256(f"{weights} {window.ids} {window.context_length}".encode()).hexdigest()[:16]


def score_plans(loaded: LoadedModel, window: Window, plans: Sequence[BudgetPlan], code: str) -> Iterator[Row]:
    """Score plans on a window, which is prefilled once for all of them.

    Raises:
        RuntimeError: a cache allocated more than its plan reserves.
    """
    run = run_digest(loaded.weights_digest, window)
    prefilled = prefill_window(loaded, window, tuple(dict.fromkeys(build_eviction(plan.eviction) for plan in plans)))
    gain = context_gain(loaded, prefilled)
    for plan in plans:
        score = score_plan(loaded, prefilled, plan)
        if score.allocated_bytes > plan.bytes_per_sequence:
            raise RuntimeError(
                f"plan {plan.digest} allocated {score.allocated_bytes} bytes on {window.name}, but reserves "
                f"{plan.bytes_per_sequence}"
            )
        yield Row(
            run=run,
            plan=plan.digest,
            window=window.name,
            nll_full=score.nll_full,
            nll=score.nll,
            kl=score.kl,
            gain=gain,
            allocated_bytes=score.allocated_bytes,
            seconds=score.seconds,
            code=code,
        )


Task = tuple[Window, tuple[BudgetPlan, ...]]

POLL_SECONDS = 1.0
"""Interval at which the parent checks whether a worker has died."""


class _Worker:
    """State of a worker process."""

    loaded: LoadedModel
    results: Any


def score_in_processes(model: str, tasks: Sequence[Task], workers: int, code: str) -> Iterator[Row]:
    """Yield the rows of all tasks as they are finished, in any order; the workers share the cores evenly.

    Raises:
        BrokenProcessPool: a worker died, for example because memory ran out.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    threads = cap_threads(max(1, available_cpus() // workers))
    pool = ProcessPoolExecutor(workers, context, _start_worker, (model, threads, results))
    try:
        yield from _as_finished([pool.submit(_score, task, code) for task in tasks], results)
        pool.shutdown()
    finally:  # after success there is nothing left to stop
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def _as_finished(tasks: list[Future[int]], results: Any) -> Iterator[Row]:
    """Yield rows until all tasks are done; a task's result is the number of rows that it sent."""
    running, received = list(tasks), 0
    while running or received < sum(task.result() for task in tasks):
        try:
            yield results.get(timeout=POLL_SECONDS)
            received += 1
        except queue.Empty:
            running = [task for task in running if not _is_done(task)]


def _is_done(task: Future[int]) -> bool:
    """Return whether a task is done; raise the error that ended it, if any."""
    return task.done() and task.result() >= 0


def _start_worker(model: str, threads: int, results: Any) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _Worker.loaded = load(model, threads=threads)
    _Worker.results = results


def _exit_with_parent() -> None:
    """End this process with its parent, since a killed parent cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _score(task: Task, code: str) -> int:
    num_sent = 0
    for row in score_plans(_Worker.loaded, *task, code):
        _Worker.results.put(row)
        num_sent += 1
    return num_sent
