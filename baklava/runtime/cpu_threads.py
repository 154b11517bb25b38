"""Threads of PyTorch: how many a process gets, and how OpenMP's threads wait for each other.

OpenMP reads its environment when torch is imported, so a command sets it first. By default its threads wait in a loop.
Beside another busy process that loop takes the core from the thread that it waits for.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

WAIT_POLICY = {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "1000",  # of GNU's OpenMP, which PyTorch's packages for Linux bring along
}
"""A thread that waits spins for some tens of microseconds, then sleeps.

On two quiet cores that makes a decode step of 8 sequences 4 % longer; 20 % without the spin. Beside a busy process such
a step takes half of the time that it takes with OpenMP's default.
"""

WAIT_VARIABLES = (*WAIT_POLICY, "KMP_BLOCKTIME")
"""What users may set to choose how threads wait; the last one is of LLVM's and Intel's OpenMP."""

CGROUP = Path("/sys/fs/cgroup")
"""Folder of the limits of a container or a service on Linux."""

OWN_CGROUPS = Path("/proc/self/cgroup")
""""0::" and the path of this process's cgroup below that folder."""


def configure_threads() -> None:
    """Set how OpenMP's threads wait, and their number if a CPU quota is lower than the number of cores.

    What is set already stays. Call it before the first import of torch.
    """
    if not openmp_environment():
        os.environ.update(WAIT_POLICY)
    cpus = available_cpus()
    if cpus < _allowed_cores():  # OpenMP itself starts a thread for each core that the process may run on
        os.environ.setdefault("OMP_NUM_THREADS", str(cpus))


def run_on_ending_thread(call: Callable[[], Result]) -> Result:
    """Return what a call returns on a thread that ends with it.

    GNU's OpenMP keeps threads for each thread that computes. If all of them are more than the cores, none spins while
    it waits, and a prompt takes 1.5 times as long. So a process that computes on a thread of its own, such as a server,
    loads the model on one that is gone by then.
    """
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(call).result()


def openmp_environment() -> dict[str, str]:
    """Return the variables of this process that say how OpenMP's threads wait, for processes on other machines."""
    return {name: os.environ[name] for name in WAIT_VARIABLES if name in os.environ}


def available_cpus() -> int:
    """Return how many cores this process may use: those of its CPU affinity, at most the CPU quota of its cgroups."""
    return max(1, min([_allowed_cores(), *map(int, _cpu_quotas())]))


def cap_threads(threads: int) -> int:
    """Return this number of threads, at most `$OMP_NUM_THREADS`."""
    outermost = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # it may list nested levels
    return min(threads, int(outermost)) if outermost.isdecimal() and int(outermost) else threads


def max_threads(nodes: Sequence[tuple[int, int]], replicas: int) -> int:
    """Return the most threads that each of so many replicas can have without two threads on a core; 0 if none fits.

    Args:
        nodes: The cores of each node, and the most replicas that it takes.
        replicas: Number of replicas, each on one node.
    """
    most = max((cores for cores, _ in nodes), default=0)
    fitting = (
        threads
        for threads in range(most, 0, -1)
        if sum(min(cores // threads, limit) for cores, limit in nodes) >= replicas > 0
    )
    return next(fitting, 0)


def _allowed_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_quotas() -> Iterator[float]:
    """Yield the quotas, in cores, of the own cgroup and of those around it; of version 1 that of the container."""
    lines = _read(OWN_CGROUPS).splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    pairs = [_read(folder / "cpu.max") for folder in accumulate(Path(own).parts[1:], Path.joinpath, initial=CGROUP)]
    pairs.append(" ".join(_read(CGROUP / f"cpu/cpu.cfs_{name}_us") for name in ("quota", "period")))
    for quota, _, period in (pair.partition(" ") for pair in pairs):
        if quota.isdecimal():  # neither "max" nor -1
            yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
