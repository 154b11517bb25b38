"""The peak memory of one prefill, in a process of its own, because an allocator keeps what it once took."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

import torch

from baklava.console import log
from baklava.evaluation.speed.workloads import baseline_prefill, random_prompt
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel, load
from baklava.runtime.prefill import prefill

SAMPLING_INTERVAL_SECONDS = 0.003
WARMUP_TOKENS = 64


def measure_prefill_peak(loaded: LoadedModel, plan: BudgetPlan | None, context: int, batch: int = 1) -> int | None:
    """Return the bytes that one prefill of random tokens adds to the weights at its peak.

    Args:
        loaded: the model; the new process loads it once more, onto the same device.
        plan: the plan to prefill under; None stands for transformers' own cache.
        context: tokens of a prompt.
        batch: prompts in the prefill.

    Returns:
        None if the process failed, for example because this one fills the GPU.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        if plan is not None:
            plan.write(file)
        sizes = [str(context), str(batch), str(torch.get_num_threads())]
        arguments = [loaded.identity.id, str(loaded.device), str(file), *sizes]
        command = [sys.executable, "-m", "baklava.evaluation.speed.peak_memory", *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or [f"it ended with {ran.returncode}"])[-1]
        log(f"peak memory could not be measured ({reason})")
        return None
    return int(ran.stdout.strip().splitlines()[-1])


def prefill_peak_over_floor(loaded: LoadedModel, plan: BudgetPlan | None, context: int, batch: int = 1) -> float | None:
    """Return the peak of a prefill, weights included, over the least it can need.

    That floor is the weights, one layer's full keys and values, and the bytes of the plan, or for the baseline
    of its full cache.
    """
    peak = measure_prefill_peak(loaded, plan, context, batch)
    if peak is None:
        return None
    geometry = loaded.geometry
    weight_bytes = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    layer_bytes = 2 * batch * geometry.kv_heads * context * geometry.head_dim * loaded.model.dtype.itemsize
    cache_bytes = layer_bytes * geometry.layers if plan is None else batch * plan.bytes_per_sequence
    return (weight_bytes + peak) / (weight_bytes + layer_bytes + cache_bytes)


def _measure(model: str, device: str, plan_file: Path, context: int, batch: int, threads: int) -> int:
    loaded = load(model, device=device, threads=threads)
    ids = random_prompt(loaded, batch, context)
    baseline_prefill(loaded, ids[:, :WARMUP_TOKENS])  # loads the code and buffers that every prefill needs
    run: Callable[[], Any] = lambda: baseline_prefill(loaded, ids)  # noqa: E731
    if plan_file.exists():
        plan = BudgetPlan.read(plan_file)
        run = lambda: prefill(loaded, plan, ids)  # noqa: E731
    if loaded.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(loaded.device)
        before = torch.cuda.memory_allocated(loaded.device)
        run()
        return torch.cuda.max_memory_allocated(loaded.device) - before
    before = _anonymous_bytes()
    with _sampled_memory() as samples:
        run()
    return max(samples) - before


@contextmanager
def _sampled_memory() -> Iterator[list[int]]:
    """Sample this process's memory; the kernel's high-water mark would count weights that were paged in again."""
    samples, stop = [_anonymous_bytes()], Event()

    def sample() -> None:
        while not stop.wait(SAMPLING_INTERVAL_SECONDS):
            samples.append(_anonymous_bytes())

    sampler = Thread(target=sample)
    sampler.start()
    try:
        yield samples
    finally:
        stop.set()
        sampler.join()


def _anonymous_bytes() -> int:
    """Return the resident bytes of this process, without those of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    model, device, file, context, batch, threads = sys.argv[1:]
    print(_measure(model, device, Path(file), int(context), int(batch), int(threads)))
