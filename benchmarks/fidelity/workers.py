"""Processes with a model each, that score window after window."""

import multiprocessing
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

from baklava.model import LoadedModel, load
from baklava.plan import BudgetPlan
from baklava.windows import Window
from benchmarks.fidelity.scoring import Row, rows

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
