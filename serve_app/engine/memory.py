"""The bytes of all KV caches of an engine: what is promised to whom, and how many sequences that makes."""

import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan, full_plan
from baklava.runtime.host_memory import available_host_bytes
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill_workspace_bytes


class Pool:
    """Promises of bytes, which together never exceed what there is."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._promised: dict[Hashable, int] = {}

    @property
    def promised(self) -> int:
        """Bytes promised now."""
        return sum(self._promised.values())

    def fits(self, size: int) -> bool:
        """Whether so many bytes more can be promised."""
        return self.promised + size <= self.total

    def promise(self, owner: Hashable, size: int) -> None:
        """Promise an owner so many bytes, instead of those it had; raises ValueError where they are not there."""
        before = self._promised.pop(owner, 0)
        if not self.fits(size):
            self._promised[owner] = before
            raise ValueError(f"{size} bytes do not fit beside the {self.promised - before} promised of {self.total}")
        self._promised[owner] = size

    def promised_to(self, owner: Hashable) -> int:
        """Bytes promised to an owner."""
        return self._promised.get(owner, 0)

    def release(self, owner: Hashable) -> None:
        """Take back what was promised to an owner, if anything was."""
        self._promised.pop(owner, None)


def capacity(plan: BudgetPlan, pool_bytes: int, tokens: int, itemsize: int) -> int:
    """How many sequences of so many tokens fit into a pool together, next to one prompt of as many that enters."""
    left = pool_bytes - prefill_workspace_bytes(plan, tokens, itemsize)
    return max(0, left // plan.bytes_for(tokens))


def capacities(plan: BudgetPlan, pool_bytes: int, lengths: Sequence[int], itemsize: int) -> dict[int, int]:
    """`capacity` for each of these lengths."""
    return {tokens: capacity(plan, pool_bytes, tokens, itemsize) for tokens in lengths}


class BrokenPromiseError(RuntimeError):
    """A cache holds more bytes than its plan promised."""


class Meter:
    """What caches hold, from their tensors: when their slots have changed, and otherwise in turns.

    To look at every tensor of every cache at every step takes as long as a tenth of the step.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[BudgetedCache, tuple[int, int]] = WeakKeyDictionary()
        self._turn = 0

    def held(self, cache: BudgetedCache) -> int:
        """Bytes that a cache holds."""
        slots, held = self._known.get(cache, (-1, 0))
        if slots != cache.num_slots:
            held = cache.nbytes
            self._known[cache] = cache.num_slots, held
        return held

    def turn(self, caches: Sequence[BudgetedCache]) -> None:
        """Have the next of these caches looked at again."""
        if caches:
            self._turn += 1
            self._known.pop(caches[self._turn % len(caches)], None)


def check_promise(held: int, promised: int) -> None:
    """Raise BrokenPromiseError where more is held than was promised."""
    if held > promised:
        raise BrokenPromiseError(f"the cache holds {held} bytes, and its plan promises at most {promised}")


_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}

LENGTHS = (1024, 4096, 8192, 32768)
"""Tokens per sequence that the table of a starting server tells about."""


@dataclass(frozen=True)
class PoolSize:
    """Bytes, or a share of the memory that is free once the model is loaded; one of both.

    A share is divided between the replicas that stand on one device, `sharing`.
    """

    amount: int | None = None
    share: float | None = None
    sharing: int = 1

    @classmethod
    def parse(cls, text: str) -> "PoolSize":
        """From `2GiB` or `50%`; raises UserError."""
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*|%)", text.strip())
        unit = found[2].upper() if found else "?"
        if found and unit == "%" and 0 < float(found[1]) <= 100:
            return cls(share=float(found[1]) / 100)
        if found and unit in _UNITS and float(found[1]) > 0:
            return cls(amount=int(float(found[1]) * _UNITS[unit]))
        raise UserError(f"--pool {text} is no size; give bytes like 2GiB, or a share of the free memory like 50%")

    def between(self, replicas: int, gpus: int = 0) -> "PoolSize":
        """The same for so many replicas: on as many GPUs, or, where there are none, on one machine."""
        return replace(self, sharing=math.ceil(replicas / (gpus or 1)))

    def bytes_of(self, free: int) -> int:
        """The pool's size where so many bytes are free."""
        return self.amount if self.amount is not None else int(free * (self.share or 0) / self.sharing)


def free_bytes(cuda: bool = False) -> int:
    """Bytes that could be allocated now, on the GPU or within this machine's or this container's memory."""
    if cuda:
        import torch

        return torch.cuda.mem_get_info()[0]
    return available_host_bytes()


def table(
    loaded: LoadedModel, plan: BudgetPlan, pool: int, lengths: Sequence[int] = LENGTHS
) -> list[tuple[int, int, int]]:
    """Tokens, sequences of so many that fit into the pool with the full 16-bit cache, and those inside the plan.

    Room for one prompt that enters is set aside in both. Lengths beyond the model's are left out, but for its own.
    """
    itemsize = loaded.model.dtype.itemsize
    rows = []
    for tokens in sorted({min(length, loaded.max_length) for length in lengths}):
        full = full_plan(loaded.identity, loaded.geometry, tokens)
        rows.append((tokens, capacity(full, pool, tokens, itemsize), capacity(plan, pool, tokens, itemsize)))
    return rows
