"""The highest memory of one prefill, in a process of its own: an allocator does not forget what came before."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import torch
from transformers import DynamicCache

from baklava.model import LoadedModel, load
from baklava.prefilling import prefill
from benchmarks.peer import PEER, as_peer
from benchmarks.plans import prefill_plans


def peak_over_floor(loaded: LoadedModel, name: str, context: int, batch: int, share: float) -> float:
    """Highest memory over weights + one layer's dense keys and values + the plan (for the peer, the full cache)."""
    asked = [loaded.identity.id, name, str(context), str(batch), str(share), str(torch.get_num_threads())]
    command = [sys.executable, "-m", "benchmarks.peak", *asked]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return float(ran.stdout.strip().splitlines()[-1])


@torch.inference_mode()
def plain(loaded: LoadedModel, ids: torch.Tensor) -> None:
    """The peer's prefill."""
    with as_peer(loaded):
        loaded.model(ids, past_key_values=DynamicCache(), logits_to_keep=1)


def _measure(model: str, name: str, context: int, batch: int, share: float, threads: int) -> float:
    loaded = load(model, threads=threads)
    geometry, plans = loaded.geometry, prefill_plans(loaded, context, share)
    ids = torch.randint(5, loaded.model.config.vocab_size, (batch, context))
    plain(loaded, ids[:, :64])  # code and buffers that every prefill needs
    before = _anonymous()
    with _watching() as seen:
        if name == PEER:
            plain(loaded, ids)
        else:
            prefill(loaded, plans[name], ids)
    grown = max(seen) - before
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    layer = 2 * batch * geometry.kv_heads * context * geometry.head_dim * loaded.model.dtype.itemsize
    held = layer * geometry.layers if name == PEER else batch * plans[name].bytes_per_sequence
    return (weights + grown) / (weights + layer + held)


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
    model, name, context, batch, share, threads = sys.argv[1:]
    print(_measure(model, name, int(context), int(batch), float(share), int(threads)))
