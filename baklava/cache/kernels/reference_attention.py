"""Attention of reference queries on CPUs: PyTorch's products, and what is between them in compiled passes."""

import functools
from importlib import import_module
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from baklava.cache.attention import AttentionParams, CentroidEntries, GroupedQueries, KVStates
from baklava.cache.kernels.numba_runtime import compiling, run_on_threads
from baklava.cache.kernels.prompt_attention import BLOCK_LOGITS, MIN_THREAD_LOGITS, fp32_precision

MIN_BLOCK_REFERENCES = 8


@functools.cache
def prepare() -> Any:
    """Return the module of the compiled passes, and compile them unless numba has them on disk."""
    module = import_module("baklava.cache.kernels.numba_references")
    blocks, logits, pairs = (np.empty((0,) * dims, np.float32) for dims in (4, 3, 2))
    with compiling():
        module.softmax_with_rest(logits, pairs, pairs, pairs, np.float32(1), np.float32(0), 0, 0)
        module.add_errors(blocks, logits, blocks, pairs, logits, pairs, pairs, 0, 0, 0)
    return module


def reference_probs(
    query: Float[Tensor, "batch heads queries head_dim"],
    rest: Float[Tensor, "batch heads queries"],
    key: KVStates,
    bias: Float[Tensor, "batch heads biased"],
    params: AttentionParams,
) -> tuple[Float[Tensor, "rows queries entries"], Float[Tensor, "rows queries"]]:
    """Return probabilities before they are divided by the totals, which are returned as well.

    Args:
        query: Query heads of each KV head, stacked.
        rest: Logarithm of the sum of exponentials over what a query attends to in addition.
        key: Keys of the entries.
        bias: What is added to the logits of the first entries.
        params: What the model's attention has in addition, without sinks.
    """
    module, rows = prepare(), key.shape[0] * key.shape[1]
    with fp32_precision(params.fp32_precision):
        logits = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2))
    totals = np.empty(logits.shape[:2], np.float32)
    options = bias.flatten(0, 1).contiguous().numpy(), np.float32(params.scaling), np.float32(params.softcap or 0)
    logs = rest.reshape(rows, -1).contiguous().numpy()

    def run(part: slice) -> int:
        first, stop, _ = part.indices(logits.shape[1])
        module.softmax_with_rest(logits.numpy(), logs, totals, *options, first, stop)
        return 0

    work = np.full(logits.shape[1], logits.shape[0] * logits.shape[2])
    run_on_threads(run, work, MIN_THREAD_LOGITS)
    return logits, torch.from_numpy(totals)


def attend_references(
    query: GroupedQueries,
    own_output: GroupedQueries,
    own_log_sum: Float[Tensor, "batch heads group queries"],
    key: KVStates,
    value: KVStates,
    params: AttentionParams,
    centroids: CentroidEntries | None,
    *,
    is_scored: bool,
) -> tuple[GroupedQueries, Float[Tensor, "batch heads entries"], Float[Tensor, "batch heads"]]:
    """Return the outputs of references, the errors that entries would leave, and the sums of squared probabilities.

    Args:
        query: Reference queries.
        own_output: Their outputs over their own block.
        own_log_sum: Logarithm of the sum of exponentials over their own block.
        key: Keys of the entries.
        value: Values of the entries.
        params: What the model's attention has in addition.
        centroids: Entries that stand for evicted ones, and are not scored.
        is_scored: Whether errors and sums are needed; else they are 0.
    """
    batch, heads, group, count = query.shape[:4]
    errors, mass = np.zeros((2, batch * heads, key.shape[2]), np.float32)
    bias, skipped = key.new_empty(batch, heads, 0), 0
    sizes = value.square().sum(3).flatten(0, 1).contiguous().numpy()
    every_value = value
    if centroids is not None:
        key, every_value = torch.cat([centroids.key, key], 2), torch.cat([centroids.value, value], 2)
        bias, skipped = centroids.bias.float(), centroids.key.shape[2]
    output = torch.empty_like(query)
    step = max(MIN_BLOCK_REFERENCES, BLOCK_LOGITS // (batch * heads * group * key.shape[2]))
    for start in range(0, count, step):
        block = slice(start, min(start + step, count))
        part, rest, own = query[:, :, :, block], own_log_sum[:, :, :, block], own_output[:, :, :, block]
        probs, totals = reference_probs(part.flatten(2, 3), rest.flatten(2, 3), key, bias, params)
        with fp32_precision(params.fp32_precision):
            sums = torch.bmm(probs, every_value.flatten(0, 1))
        totals = totals.view(rest.shape)
        answered = sums.view(part.shape) / totals[..., None]
        share = 1 - probs.sum(2).view(rest.shape) / totals
        answered += share[..., None] * own
        output[:, :, :, block] = answered
        if is_scored:
            with fp32_precision(params.fp32_precision):
                products = torch.bmm(answered.flatten(0, 1).flatten(1, 2), value.flatten(0, 1).transpose(1, 2))
            shape = (batch * heads, group, part.shape[3])
            _add_errors(
                probs.view(*shape, -1).numpy(),
                totals.reshape(shape).numpy(),
                products.view(*shape, -1).numpy(),
                (sizes, answered.square().sum(4).view(shape).numpy(), errors, mass),
                skipped,
            )
    return output, torch.from_numpy(errors).view(batch, heads, -1), torch.from_numpy(mass).view(batch, heads, -1).sum(2)


def _add_errors(
    probs: np.ndarray, totals: np.ndarray, products: np.ndarray, sums: tuple[Any, ...], skipped: int
) -> None:
    module, entries = prepare(), products.shape[3]

    def run(part: slice) -> int:
        first, stop, _ = part.indices(entries)
        module.add_errors(probs, totals, products, *sums, skipped, first, stop)
        return 0

    run_on_threads(run, np.full(entries, products.size // max(1, entries)), MIN_THREAD_LOGITS)
