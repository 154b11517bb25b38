"""Attention of many tokens at a time on CPUs: PyTorch's products, and what is between them in compiled passes.

Probabilities are never materialised for more than a block of queries. They are there for scores, which cost next to
nothing then, while fused attention would keep them to itself.
"""

import functools
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava.cache.attention import AttentionParams, CentroidEntries, GroupedQueries, KVStates
from baklava.cache.kernels.numba_runtime import compiling, is_available, run_on_threads

BLOCK_LOGITS = 1 << 21
"""Logits of a block; in 8 MiB they stay in the processor's cache."""

MIN_BLOCK_QUERIES, MAX_BLOCK_QUERIES = 16, 256
"""Of the logits of many queries to themselves, half are of no use."""

MIN_THREAD_LOGITS = 1 << 16
"""Logits for which a thread is woken."""

_workspaces = threading.local()


@dataclass(frozen=True, eq=False)
class ScoreSum:
    """The attention that entries get, summed over queries, as heavy hitters are scored.

    Args:
        weights: Weight of each query.
        distance: Only queries at least this many tokens after an entry count.
        squared: Whether squares are summed.
        by_max: Whether the queries of a KV head are reduced by their maximum, else by their mean.
        sums: The sums, which are changed.
        query_positions: Position of each query.
        key_positions: Position of each entry.
    """

    weights: Float[Tensor, " queries"]
    distance: int
    squared: bool
    by_max: bool
    sums: Float[Tensor, "rows entries"]
    query_positions: Int[Tensor, " queries"]
    key_positions: Int[Tensor, "rows entries"]

    def arrays(self, start: int, stop: int) -> tuple[Any, ...]:
        """Return what `numba_prompt.add_scores` takes of it, for some of the queries."""
        of_queries = self.weights[start:stop].numpy(), self.query_positions[start:stop].numpy()
        rule = self.distance, self.squared, self.by_max
        return (*of_queries, self.key_positions.numpy(), *rule, self.sums.numpy())


def can_attend_prompt(query: Tensor, key: Tensor) -> bool:
    """Return whether `attend_prompt` takes such queries and keys."""
    is_float32 = query.dtype == key.dtype == torch.float32
    is_plain = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
    return query.device.type == "cpu" and is_float32 and is_plain and is_available()


@functools.cache
def prepare() -> Any:
    """Return the module of the compiled passes, and compile them unless numba has them on disk."""
    module = import_module("baklava.cache.kernels.numba_prompt")
    logits, totals, pairs = (np.empty((0,) * dims, np.float32) for dims in (4, 3, 2))
    positions, one = np.empty((0, 0), np.int32), np.float32(1)
    with compiling():
        module.softmax_rows(logits, totals, pairs, pairs, 1, one, one, 0, 0)
        scored = pairs.ravel(), positions.ravel(), positions, 0, True, True, pairs
        module.add_scores(logits, totals, *scored, 0, 0, 0)
    return module


def attend_prompt(
    query: GroupedQueries,
    key: KVStates,
    value: KVStates,
    params: AttentionParams,
    centroids: CentroidEntries | None = None,
    scores: Sequence[ScoreSum] = (),
) -> GroupedQueries:
    """Return the output of all queries, whose own entries are the last ones. All others are visible to each query.

    Args:
        query: Grouped queries, without padding.
        key: Keys of the entries.
        value: Values of the entries.
        params: What the model's attention has in addition.
        centroids: Entries that stand for evicted ones.
        scores: What to add to.
    """
    module, num_centroids = prepare(), 0
    batch, heads, group, queries, _ = query.shape
    rows, bias = batch * heads, np.empty((batch * heads, 0), np.float32)
    if centroids is not None:
        key, value = torch.cat([centroids.key, key], 2), torch.cat([centroids.value, value], 2)
        bias = centroids.bias.float().flatten(0, 1).contiguous().numpy()
        num_centroids = bias.shape[1]
    key, value, grouped = key.flatten(0, 1), value.flatten(0, 1), query.flatten(0, 1)
    num_before, start = key.shape[1] - queries, 0
    softmax_options = bias, _sinks(params, batch, heads), np.float32(params.scaling), np.float32(params.softcap or 0)
    output = query.new_empty(query.shape)
    while start < queries:
        stop = min(start + _block_queries(rows * group, num_before + start), queries)
        reach, block = num_before + stop, grouped[:, :, start:stop].flatten(1, 2)
        logits = _workspace(rows * block.shape[1] * reach).view(rows, block.shape[1], reach)
        with fp32_precision(params.fp32_precision):
            torch.bmm(block, key[:, :reach].transpose(1, 2), out=logits)
        probs = logits.view(rows, group, stop - start, reach).numpy()
        totals = _softmax(module, probs, num_before + start + 1, softmax_options)
        for score in scores:
            _add_scores(module, probs, totals, score.arrays(start, stop), num_centroids)
        with fp32_precision(params.fp32_precision):
            sums = torch.bmm(logits, value[:, :reach])
        own = output.flatten(0, 1)[:, :, start:stop]
        torch.div(sums.view(own.shape), torch.from_numpy(totals)[..., None], out=own)
        start = stop
    return output


def _block_queries(rows: int, num_before: int) -> int:
    """Return how many queries have as many logits as a block, over the entries before them and their own."""
    queries = int((math.sqrt(num_before**2 + 4 * BLOCK_LOGITS / rows) - num_before) / 2)
    return min(max(MIN_BLOCK_QUERIES, queries), MAX_BLOCK_QUERIES)


def _sinks(params: AttentionParams, batch: int, heads: int) -> np.ndarray:
    if params.sink_logits is None:
        return np.empty((0, 0), np.float32)
    return np.tile(params.sink_logits.float().view(heads, -1).numpy(), (batch, 1))


def _workspace(numbers: int) -> Tensor:
    """Return memory that is kept, since fresh memory costs more than what is done with it."""
    if numbers > BLOCK_LOGITS:
        return torch.empty(numbers)
    kept: np.ndarray | None = getattr(_workspaces, "kept", None)
    if kept is None or len(kept) < numbers:
        # No tensor, which would be only for inference mode, or not for it.
        kept = _workspaces.kept = np.empty(BLOCK_LOGITS, np.float32)
    return torch.from_numpy(kept[:numbers])


class _Rounding:
    """Counts the threads that let PyTorch round the factors of float32 products, which is a setting of the process."""

    def __init__(self) -> None:
        self._lock, self._users, self._before = threading.Lock(), 0, "none"

    @contextmanager
    def __call__(self, precision: str | None) -> Iterator[None]:
        """Round them in this context, unless the precision is None; results are not rounded."""
        if precision is None:
            yield
            return
        matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        with self._lock:
            if not self._users:
                self._before, matmul.fp32_precision = matmul.fp32_precision, precision
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    matmul.fp32_precision = self._before


fp32_precision = _Rounding()


def _softmax(module: Any, logits: np.ndarray, num_visible: int, options: tuple[Any, ...]) -> np.ndarray:
    """Replace logits by probabilities, and return what they are to be divided by."""
    queries, totals = logits.shape[2], np.empty(logits.shape[:3], np.float32)
    bias, sinks, *factors = options

    def run(part: slice) -> int:
        first, stop, _ = part.indices(queries)
        module.softmax_rows(logits, totals, bias, sinks, num_visible, *factors, first, stop)
        return 0

    run_on_threads(run, np.full(queries, logits.size // queries), MIN_THREAD_LOGITS)
    return totals


def _add_scores(module: Any, probs: np.ndarray, totals: np.ndarray, scored: tuple[Any, ...], skipped: int) -> None:
    entries = probs.shape[3] - skipped

    def run(part: slice) -> int:
        first, stop, _ = part.indices(entries)
        module.add_scores(probs, totals, *scored, skipped, first, stop)
        return 0

    run_on_threads(run, np.full(entries, probs.size // max(1, entries)), MIN_THREAD_LOGITS)
