"""The bytes of all KV caches of an engine: what is promised to whom, and how many sequences that makes."""

from collections.abc import Hashable, Sequence
from weakref import WeakKeyDictionary

from baklava.cache import BudgetedCache
from baklava.entering import transient_bytes
from baklava.plan import BudgetPlan


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
    left = pool_bytes - transient_bytes(plan, tokens, itemsize)
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
        if slots != cache.slots:
            held = cache.nbytes
            self._known[cache] = cache.slots, held
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
