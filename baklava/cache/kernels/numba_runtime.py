"""Whether numba works here, how its kernels are compiled, and the threads that they run on."""

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from baklava.errors import UserError
from baklava.paths import cache_dir

logger = logging.getLogger(__name__)

NOTICE_SECONDS = 2.0
"""Compilation that takes longer is announced."""


@functools.cache
def is_available() -> bool:
    """Return whether numba works and the CPU has the instructions that the kernels need."""
    if find_spec("numba") is None:
        logger.warning(
            "numba is not installed, so sequences are decoded one by one, which takes several times as long: "
            "pip install numba"
        )
        return False
    try:
        import numba  # noqa: F401
        from llvmlite import binding
    except (ImportError, OSError) as error:  # numba refuses a numpy that is too new, llvmlite may miss a library
        logger.warning(
            "numba cannot be imported (%s), so sequences are decoded one by one, which takes several times as long",
            error,
        )
        return False
    if "x86_64" in binding.get_default_triple() and not binding.get_host_cpu_features().get("f16c"):
        logger.warning("this CPU has no instructions for float16 (F16C), so sequences are decoded one by one")
        return False
    return True


@functools.cache
def kernel() -> Any:
    """Return the module of the kernels that work on a table, or None if numba is not available."""
    if not is_available():
        return None
    module = import_module("baklava.cache.kernels.numba_decode")
    module.drop_stale_code()
    return module


@contextmanager
def compiling() -> Iterator[None]:
    """Announce compilation if it takes long, and let one process of the user compile at a time.

    The others find the code on disk then. numba itself may give the code of two kernels the same name if two processes
    save them at once.
    """
    notice = threading.Timer(
        NOTICE_SECONDS, logger.warning, ["compiling kernels for this CPU, once; it takes half a minute"]
    )
    notice.daemon = True
    notice.start()
    try:
        with ExitStack() as stack:
            with suppress(OSError, UserError):  # no folder that takes a lock
                cache_dir().mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(cache_dir() / "kernel.lock"))
            yield
    finally:
        notice.cancel()


def run_on_threads(run: Callable[[slice], int], work: np.ndarray, min_work: int) -> int:
    """Run a function on all rows, on as many threads as PyTorch uses if that is worth it, and return its total.

    The threads sleep while they wait, and the function must not hold Python's lock.

    Args:
        run: Takes adjacent rows, and returns a number.
        work: How much work each row is.
        min_work: Work for which a thread is woken.
    """
    ends = work.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    threads = min(torch.get_num_threads(), total // min_work)
    if threads < 2:
        return run(slice(None))
    shares = np.arange(1, threads) * (total / threads)
    stops = [0, *np.searchsorted(ends - work / 2, shares).tolist(), len(work)]
    first, *others = [slice(start, stop) for start, stop in pairwise(stops)]
    pool, running = _thread_pool(torch.get_num_threads() - 1), []
    try:
        for rows in others:
            running.append(pool.submit(run, rows))
        number = run(first)
    finally:
        wait(running)
    return number + sum(each.result() for each in running)


@functools.cache
def _thread_pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "decode-kernel")


os.register_at_fork(after_in_child=_thread_pool.cache_clear)
