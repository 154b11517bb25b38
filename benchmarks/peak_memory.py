"""The highest memory of one prefill, in a process of its own: an allocator does not forget what came before."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

import torch
from transformers import DynamicCache

from baklava.console import log
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel, load
from baklava.runtime.prefill import prefill
from benchmarks.transformers_baseline import as_peer


def peak(loaded: LoadedModel, plan: BudgetPlan | None, context: int, batch: int = 1) -> int | None:
    """Most bytes that one prefill of this many random tokens adds to the weights; without a plan, the peer's.

    None where that process could not hold the model, as on a GPU that this one fills.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        if plan is not None:
            plan.write(file)
        asked = [loaded.identity.id, str(file), str(context), str(batch), str(torch.get_num_threads())]
        command = [sys.executable, "-m", "benchmarks.peak_memory", *asked]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or [f"it ended with {ran.returncode}"])[-1]
        log(f"a peak of memory could not be measured ({reason})")
        return None
    return int(ran.stdout.strip().splitlines()[-1])


def over_floor(loaded: LoadedModel, plan: BudgetPlan | None, context: int, batch: int) -> float | None:
    """The peak over its floor: weights, one layer's dense keys and values, and the plan (the peer's full cache)."""
    measured = peak(loaded, plan, context, batch)
    if measured is None:
        return None
    geometry = loaded.geometry
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    layer = 2 * batch * geometry.kv_heads * context * geometry.head_dim * loaded.model.dtype.itemsize
    held = layer * geometry.layers if plan is None else batch * plan.bytes_per_sequence
    return (weights + measured) / (weights + layer + held)


@torch.inference_mode()
def plain(loaded: LoadedModel, ids: torch.Tensor) -> None:
    """The peer's prefill."""
    with as_peer(loaded):
        loaded.model(ids, past_key_values=DynamicCache(), logits_to_keep=1)


def _measure(model: str, file: Path, context: int, batch: int, threads: int) -> int:
    loaded = load(model, threads=threads)
    ids = torch.randint(5, loaded.model.config.vocab_size, (batch, context)).to(loaded.device)
    plain(loaded, ids[:, :64])  # code and buffers that every prefill needs
    run: Callable[[], Any] = lambda: plain(loaded, ids)  # noqa: E731
    if file.exists():
        plan = BudgetPlan.read(file)
        run = lambda: prefill(loaded, plan, ids)  # noqa: E731
    if loaded.device.type == "cuda":
        return _on_gpu(run)
    before = _anonymous()
    with _watching() as seen:
        run()
    return max(seen) - before


def _on_gpu(run: Callable[[], Any]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def _watching() -> Iterator[list[int]]:
    """Looks at the memory every few milliseconds; the kernel's own mark counts weights that it paged in again."""
    seen, stop = [_anonymous()], Event()

    def watch() -> None:
        while not stop.wait(0.003):
            seen.append(_anonymous())

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        stop.set()
        watcher.join()


def _anonymous() -> int:
    """Bytes that this process holds, files that it mapped left out."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    model, file, context, batch, threads = sys.argv[1:]
    print(_measure(model, Path(file), int(context), int(batch), int(threads)))
