"""The bytes of an engine's KV caches: what requests need, what is reserved and allocated, and the size of the pool."""

import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan, full_cache_plan
from baklava.runtime.host_memory import available_host_bytes
from baklava.runtime.logprobs import prompt_logprobs_workspace_bytes
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill_workspace_bytes
from serve_app.engine.prefix_cache import Prefix
from serve_app.engine.sequence import Request


class ByteBudget:
    """Reservations of bytes, which together never exceed the total."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes, self.reserved_bytes = total_bytes, 0
        self._reservations: dict[Hashable, int] = {}

    def can_reserve(self, nbytes: int) -> bool:
        """Return whether `nbytes` more can be reserved."""
        return self.reserved_bytes + nbytes <= self.total_bytes

    def reserve(self, owner: Hashable, nbytes: int) -> None:
        """Reserve bytes for an owner in place of those it had. Raises ValueError if they are not available."""
        others = self.reserved_bytes - self.reserved_by(owner)
        if others + nbytes > self.total_bytes:
            raise ValueError(f"{nbytes} bytes do not fit alongside the {others} reserved of {self.total_bytes}")
        self._reservations[owner] = nbytes
        self.reserved_bytes = others + nbytes

    def reserved_by(self, owner: Hashable) -> int:
        """Return the bytes reserved for an owner."""
        return self._reservations.get(owner, 0)

    def release(self, owner: Hashable) -> None:
        """Give back what is reserved for an owner, if anything is."""
        self.reserved_bytes -= self._reservations.pop(owner, 0)


@dataclass(frozen=True)
class MemoryRequirement:
    """Bytes that must be available before a request is admitted.

    Args:
        cache_bytes: the caches of its sequences at their maximum length.
        workspace_bytes: what the prompt allocates in addition while it is prefilled.
        prefix_bytes: a new prefix cache entry.
        prefix: the pinned prefix that the prompt starts with.
    """

    cache_bytes: int
    workspace_bytes: int
    prefix_bytes: int = 0
    prefix: Prefix | None = None

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return self.cache_bytes + self.workspace_bytes + self.prefix_bytes


def memory_required(
    loaded: LoadedModel, plan: BudgetPlan, request: Request, prefix: Prefix | None = None, *, is_cached: bool = False
) -> MemoryRequirement:
    """Return what a request needs under a plan if its prompt starts with `prefix`, which is in the cache or not."""
    params = request.params
    only_fills_prefix_cache = not params.sampling_params.max_tokens and prefix == params.prompt
    cache_bytes = 0 if only_fills_prefix_cache else params.n * plan.bytes_for(request.max_tokens)
    if params.prompt_logprobs is not None:
        workspace = prompt_logprobs_workspace_bytes(plan, request.max_tokens, loaded.model.dtype.itemsize)
        return MemoryRequirement(cache_bytes, workspace)
    if prefix is None:
        return MemoryRequirement(cache_bytes, prefill_workspace(loaded, plan, len(params.prompt)))
    if is_cached:
        return MemoryRequirement(cache_bytes, 0, prefix=prefix)
    workspace = prefill_workspace(loaded, plan, len(prefix))
    return MemoryRequirement(cache_bytes, workspace, plan.bytes_for(len(prefix)), prefix)


def prefill_workspace(loaded: LoadedModel, plan: BudgetPlan, tokens: int) -> int:
    """Return the bytes that a prompt allocates in addition to its cache while it is prefilled."""
    return prefill_workspace_bytes(plan, tokens, loaded.model.dtype.itemsize)


class ReservationExceededError(RuntimeError):
    """A cache allocates more bytes than were reserved for it."""


def check_reservation(allocated_bytes: int, reserved_bytes: int) -> None:
    """Raise ReservationExceededError if more bytes are allocated than reserved."""
    if allocated_bytes > reserved_bytes:
        raise ReservationExceededError(
            f"the cache allocates {allocated_bytes} bytes, and its plan reserves at most {reserved_bytes}"
        )


_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class PoolSize:
    """Bytes, or a fraction of the memory that is free once the model is loaded; one of both.

    A fraction is divided between the replicas on one device.
    """

    num_bytes: int | None = None
    fraction: float | None = None
    replicas_per_device: int = 1

    @classmethod
    def parse(cls, text: str) -> "PoolSize":
        """Read `2GiB` or `50%`. Raises UserError."""
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*|%)", text.strip())
        unit = match[2].upper() if match else "?"
        if match and unit == "%" and 0 < float(match[1]) <= 100:
            return cls(fraction=float(match[1]) / 100)
        if match and unit in _UNITS and float(match[1]) > 0:
            return cls(num_bytes=int(float(match[1]) * _UNITS[unit]))
        raise UserError(
            f"--pool {text} is not a size: give bytes such as 2GiB, or a share of the free memory such as 50%"
        )

    def shared_by(self, replicas: int, gpus: int = 0) -> "PoolSize":
        """Return the size for `replicas` on `gpus` GPUs, or on one machine if it has none."""
        return replace(self, replicas_per_device=math.ceil(replicas / (gpus or 1)))

    def resolve(self, free_bytes: int) -> int:
        """Return the pool's bytes, given what is free on the device."""
        if self.num_bytes is not None:
            return self.num_bytes
        return int(free_bytes * (self.fraction or 0) / self.replicas_per_device)


def free_memory_bytes(cuda: bool = False) -> int:
    """Return the bytes that could be allocated now, on the GPU or in the memory of this machine or container."""
    if cuda:
        import torch

        return torch.cuda.mem_get_info()[0]
    return available_host_bytes()


def max_sequences(plan: BudgetPlan, pool_bytes: int, tokens: int, itemsize: int) -> int:
    """Return how many sequences of `tokens` fit into a pool together, along with one such prompt being prefilled."""
    available = pool_bytes - prefill_workspace_bytes(plan, tokens, itemsize)
    return max(0, available // plan.bytes_for(tokens))


CAPACITY_TABLE_TOKENS = (1024, 4096, 8192, 32768)
"""Sequence lengths in the capacity table that a starting server prints."""


def capacity_table(
    loaded: LoadedModel, plan: BudgetPlan, pool_bytes: int, lengths: Sequence[int] = CAPACITY_TABLE_TOKENS
) -> list[tuple[int, int, int]]:
    """Return rows of (tokens, sequences that fit with the full 16-bit cache, sequences that fit under the plan).

    Lengths above the model's are replaced by it.
    """
    itemsize = loaded.model.dtype.itemsize
    rows = []
    for tokens in sorted({min(length, loaded.max_length) for length in lengths}):
        full = full_cache_plan(loaded.identity, loaded.geometry, tokens)
        rows.append(
            (
                tokens,
                max_sequences(full, pool_bytes, tokens, itemsize),
                max_sequences(plan, pool_bytes, tokens, itemsize),
            )
        )
    return rows
