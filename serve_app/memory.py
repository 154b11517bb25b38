"""How large the pool of KV caches is, and how many sequences fit into it."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from baklava.errors import UserError
from baklava.memory import free_host_bytes
from baklava.model import LoadedModel
from baklava.plan import BudgetPlan, full_plan
from serve_app.pool import capacity

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
    return free_host_bytes()


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
