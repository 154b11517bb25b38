"""Plans on a window: one prefill, then a row a plan."""

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
from baklava.runtime.model_loader import LoadedModel, load
from baklava.serialization import FrozenModel


class Row(FrozenModel):
    """One plan on one window; NLLs, KL and gain in nats per token.

    `run` stands for the weights and the window's ids, `plan` is the plan's digest, `code` the commit that scored it.
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
        """What is not scored twice."""
        return self.run, self.plan


def run_of(weights: str, window: Window) -> str:
    """Stands for these weights on this window."""
    return hashlib.sha256(f"{weights} {window.ids} {window.context_length}".encode()).hexdigest()[:16]


def rows(loaded: LoadedModel, window: Window, plans: Sequence[BudgetPlan], code: str) -> Iterator[Row]:
    """Score plans on a window that is prefilled once for all of them.

    Raises:
        RuntimeError: a cache held more than its plan promised.
    """
    run = run_of(loaded.weights_digest, window)
    prefilled = prefill_window(loaded, window, tuple(dict.fromkeys(build_eviction(plan.eviction) for plan in plans)))
    worth = context_gain(loaded, prefilled)
    for plan in plans:
        found = score_plan(loaded, prefilled, plan)
        if found.allocated_bytes > plan.bytes_per_sequence:
            raise RuntimeError(
                f"plan {plan.digest} held {found.allocated_bytes} bytes on {window.name}, but promised "
                f"{plan.bytes_per_sequence}"
            )
        yield Row(
            run=run,
            plan=plan.digest,
            window=window.name,
            nll_full=found.nll_full,
            nll=found.nll,
            kl=found.kl,
            gain=worth,
            allocated_bytes=found.allocated_bytes,
            seconds=found.seconds,
            code=code,
        )


Task = tuple[Window, tuple[BudgetPlan, ...]]

_LOOK_EVERY = 1.0  # seconds between two looks whether a worker has died


class _Own:
    """What a worker process has for itself."""

    loaded: LoadedModel
    results: Any


def in_processes(model: str, tasks: Sequence[Task], workers: int, code: str) -> Iterator[Row]:
    """The rows of all tasks as they come, in any order; the cores are shared out among the workers.

    Raises:
        BrokenProcessPool: a worker died, for example for want of memory.
    """
    context = multiprocessing.get_context("spawn")
    results, threads = context.Queue(), max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(workers, context, _begin, (model, threads, results))
    try:
        yield from _as_they_come([pool.submit(_score, task, code) for task in tasks], results)
        pool.shutdown()
    finally:  # there is nothing left to do here where all went well
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def _as_they_come(waiting: list[Future[int]], results: Any) -> Iterator[Row]:
    """Rows until all tasks are done; a task's result is how many rows it sent."""
    missing, received = list(waiting), 0
    while missing or received < sum(task.result() for task in waiting):
        try:
            yield results.get(timeout=_LOOK_EVERY)
            received += 1
        except queue.Empty:
            missing = [task for task in missing if not _finished(task)]


def _finished(task: Future[int]) -> bool:
    """Whether a task is done; raises what ended it, if something did."""
    return task.done() and task.result() >= 0


def _begin(model: str, threads: int, results: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Own.loaded, _Own.results = load(model, threads=threads), results


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _score(task: Task, code: str) -> int:
    sent = 0
    for row in rows(_Own.loaded, *task, code):
        _Own.results.put(row)
        sent += 1
    return sent
