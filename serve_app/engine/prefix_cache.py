"""Prompts that were declared beforehand: entered once, and copied by every request that begins with one of them."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.prefill import Logits

Prefix = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A cache at the end of a declared prompt, which nothing changes any more, and the logits behind it."""

    cache: BudgetedCache
    logits: Logits

    @cached_property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.cache.nbytes


class Snapshots:
    """Declared prompts, and the snapshots of those that have been computed inside the current plan."""

    def __init__(self, plan: BudgetPlan) -> None:
        self.plan = plan
        self._writing = threading.Lock()  # what is read is never changed, but replaced
        self._known: dict[Prefix, Snapshot | None] = {}

    @property
    def declared(self) -> list[Prefix]:
        """All declared prompts."""
        return list(self._known)

    def declare(self, prefix: Prefix) -> None:
        """From now on, prompts that begin so are cut here."""
        with self._writing:
            self._known = {**self._known, prefix: self._known.get(prefix)}

    def begins(self, prompt: Sequence[int]) -> Prefix | None:
        """The longest declared prompt that this one begins with."""
        found = [prefix for prefix in self._known if tuple(prompt[: len(prefix)]) == prefix]
        return max(found, key=len, default=None)

    def of(self, prefix: Prefix) -> Snapshot | None:
        """Its snapshot, if it has been computed."""
        return self._known.get(prefix)

    @property
    def missing(self) -> list[Prefix]:
        """Declared prompts without a snapshot."""
        return [prefix for prefix, snapshot in self._known.items() if snapshot is None]

    def keep(self, prefix: Prefix, snapshot: Snapshot) -> None:
        """Keep the snapshot of a declared prompt, unless it was made inside another plan."""
        with self._writing:
            if snapshot.cache.plan is self.plan:
                self._known = self._known | {prefix: snapshot}

    def forget(self, plan: BudgetPlan) -> list[Prefix]:
        """Drop all snapshots, because another plan is in force; gives their prompts, which stay declared."""
        with self._writing:
            dropped = [prefix for prefix, snapshot in self._known.items() if snapshot is not None]
            self._known, self.plan = dict.fromkeys(self._known), plan
        return dropped

    @property
    def nbytes(self) -> int:
        """Bytes held by all snapshots."""
        return sum(snapshot.nbytes for snapshot in self._known.values() if snapshot)
