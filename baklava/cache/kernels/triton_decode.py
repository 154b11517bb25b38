"""One new token of each (sequence, KV head) of a layer on a GPU: what `numba_decode` does on a CPU.

`decode_layer` launches the kernels of `triton_kernels`, without waiting for the device. A row of its arguments is one
(sequence, KV head). All formats of rows are one variant of each kernel: to launch once per format, somebody would have
to read the table on the host and to copy rows together, and a layer with five kinds of bits would be five times as many
small launches. So a kernel reads the bits of its row and branches on them. A CUDA graph of the launches stays valid
while the table changes, if `max_entries` is a bound that stays.

Long rows are split, so that a few of them use the whole device: each split has a softmax of its own, and another kernel
joins them.
"""

import functools
import logging
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from baklava.cache import table_columns as columns
from baklava.cache.storage.quantized_codec import NORMAL_STEP_SIZES

logger = logging.getLogger(__name__)

CHANNEL_MULTIPLE = 32
MAX_HEAD_DIM = 256

ENTRY_BLOCK = 32
"""Entries that a program reads at a time."""

TARGET_PROGRAMS = 512
"""Programs that fill a large device. Rows are split until there are as many."""

SCORE_BLOCK = 256
"""Entries whose scores a program updates."""


@functools.cache
def is_available(device: torch.device) -> bool:
    """Return whether the kernels run on this device: with CUDA, or on a CPU in Triton's interpreter.

    The first call compiles the kernels. It warns if they do not compile, or if they give a wrong result.
    """
    if find_spec("triton") is None:
        return False
    try:
        if device.type != ("cpu" if _is_interpreted() else "cuda"):
            return False
        error = _first_launch_error(device)
    except Exception as failure:  # an import, a compiler, a driver and a device may each fail in their own way
        error = f"{type(failure).__name__}: {failure}"
    if error:
        logger.warning(
            "the decode kernels do not run on %s (%s), so PyTorch decodes, which takes longer", device, error
        )
    return not error


def decode_layer(
    tables: Tensor,
    slots: Tensor,
    counts: Tensor,
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sinks: Tensor,
    probs: Tensor,
    scaling: float,
    softcap: float,
    update: int,
    distance: int,
    squared: bool,
    by_max: bool,
    max_entries: int,
    dense_dtype: torch.dtype,
) -> Tensor:
    """Store and attend to one new token of each (sequence, KV head), and return its vectors as they are rotated.

    All tensors are on one device. Products of half-precision queries are in half precision with sums in 32 bits, those
    of float32 are in float32.

    Args:
        tables: int64 [rows, columns]: addresses and formats, by `table_columns`.
        slots: int64 [rows]: slot of the new entry.
        counts: int64 [rows]: entries with the new one.
        positions: int64 [rows]: position of the new token.
        query: [rows, group, head_dim] in the dtype of the model.
        key: [rows, head_dim].
        value: [rows, head_dim].
        output: [rows, group, head_dim], contiguous, which is written.
        sinks: Learned sink logits [rows, group], or of size 0.
        probs: float32 [rows, group, entries], contiguous, which is written for KEEP_PROBS, or of size 0.
        scaling: Factor of the logits.
        softcap: Softcap of the logits, or 0.
        update: What becomes of the probabilities: NO_UPDATE, HEAVY_HITTER, or KEEP_PROBS to write them to `probs`.
        distance: As in HeavyHitter.
        squared: Whether its power is 2.
        by_max: Whether its reduction is "max".
        max_entries: At least the largest of `counts`, which is on the device.
        dense_dtype: Dtype of dense entries with two bytes, and of the means of keys.

    Returns:
        float32 [rows, group + 2, head_dim]: the queries, the key and the value.
    """
    rows, group, head_dim = query.shape
    if head_dim % CHANNEL_MULTIPLE or head_dim > MAX_HEAD_DIM:
        raise ValueError(f"heads of {head_dim} channels: the kernels take multiples of {CHANNEL_MULTIPLE} up to 256")
    if not (output.is_contiguous() and probs.is_contiguous()):
        raise ValueError("output and probs must be contiguous")
    rotated = query.new_empty(rows, group + 2, head_dim, dtype=torch.float32)
    if not rows:
        return rotated
    kernels, device = _kernels(), query.device
    tables, slots, counts, positions = (each.contiguous() for each in (tables, slots, counts, positions))
    query, key, value, sinks = (each.contiguous() for each in (query, key, value, sinks))
    number = torch.float32 if _is_interpreted() and query.dtype == torch.bfloat16 else query.dtype
    blocks = -(-max_entries // ENTRY_BLOCK)
    splits = max(1, min(kernels.MAX_SPLITS.value, blocks, -(-TARGET_PROGRAMS // rows)))
    logits = probs
    if update == columns.HEAVY_HITTER:
        logits = rotated.new_empty(rows, group, max_entries)
    stats = rotated.new_empty(rows, splits, 2, group)
    sums = rotated.new_empty(rows, splits, group, head_dim)
    totals = rotated.new_empty(rows, group, 2)
    padded, heads = _next_power_of_2(head_dim), _next_power_of_2(group)
    dense = _triton_dtype(dense_dtype)
    with torch.cuda.device_of(query):
        kernels.store_token[(rows, group + 2)](
            tables,
            slots,
            positions,
            query,
            key,
            value,
            rotated,
            _step_sizes(device),
            group=group,
            head_dim=head_dim,
            padded=padded,
            dense=dense,
        )
        kernels.attend_split[(rows, splits)](
            tables,
            counts,
            rotated,
            logits,
            stats,
            sums,
            scaling,
            softcap,
            splits,
            logits.shape[2],
            group=group,
            heads=heads,
            head_dim=head_dim,
            lanes=padded // 2,
            block=ENTRY_BLOCK,
            keeps_logits=update != columns.NO_UPDATE,
            dense=dense,
            number=_triton_dtype(number),
        )
        kernels.join_splits[(rows, group)](
            tables,
            counts,
            stats,
            sums,
            sinks,
            output,
            totals,
            splits,
            group=group,
            head_dim=head_dim,
            padded=padded,
            block=ENTRY_BLOCK,
            has_sinks=sinks.numel() > 0,
        )
        if update != columns.NO_UPDATE:
            kernels.use_probs[(rows, -(-max_entries // SCORE_BLOCK))](
                tables,
                counts,
                positions,
                logits,
                totals,
                logits.shape[2],
                distance,
                group=group,
                heads=heads,
                block=SCORE_BLOCK,
                update=update,
                squared=squared,
                by_max=by_max,
            )
    return rotated


def _kernels() -> Any:
    return import_module("baklava.cache.kernels.triton_kernels")


def _is_interpreted() -> bool:
    return bool(import_module("triton").knobs.runtime.interpret)


def _triton_dtype(dtype: torch.dtype) -> Any:
    language = import_module("triton.language")
    return {torch.float32: language.float32, torch.float16: language.float16, torch.bfloat16: language.bfloat16}[dtype]


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


@functools.cache
def _step_sizes(device: torch.device) -> Tensor:
    return torch.tensor([0.0, *(NORMAL_STEP_SIZES[bits] for bits in range(1, 9))], device=device)


def _first_launch_error(device: torch.device) -> str | None:
    """Return what is wrong if a cache of one entry does not give its value, or None."""
    head_dim = CHANNEL_MULTIPLE
    entries = torch.zeros(2, 1, head_dim, dtype=torch.float16, device=device)
    table = torch.zeros(1, columns.NUM_COLUMNS, dtype=torch.int64)
    for storage, address in ((columns.KEY, entries[0].data_ptr()), (columns.VALUE, entries[1].data_ptr())):
        table[0, storage + columns.SINKS] = address
        table[0, storage + columns.QUANTIZED_START] = table[0, storage + columns.QUANTIZED_STOP] = columns.NO_SLOT
        table[0, storage + columns.DENSE_BYTES] = entries.itemsize
    numbers = torch.tensor([0, 1], device=device)
    value = torch.linspace(-1, 1, head_dim, device=device).half().float()[None]
    output, none = torch.empty(1, 1, head_dim, device=device), torch.empty(0, 0, 0, device=device)
    decode_layer(
        tables=table.to(device),
        slots=numbers[:1],
        counts=numbers[1:],
        positions=numbers[:1],
        query=torch.ones(1, 1, head_dim, device=device),
        key=torch.ones(1, head_dim, device=device),
        value=value,
        output=output,
        sinks=none,
        probs=none,
        scaling=1.0,
        softcap=0.0,
        update=columns.NO_UPDATE,
        distance=0,
        squared=False,
        by_max=False,
        max_entries=1,
        dense_dtype=torch.float16,
    )
    error = float((output[0] - value).abs().max())
    return None if error < 1e-5 else f"the output of one entry is not its value, but {error:.3g} from it"
