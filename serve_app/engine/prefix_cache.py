"""The KV caches of pinned prefixes: prefilled once, and copied for every request whose prompt starts with one."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.prefill import Logits

Prefix = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PrefixCacheEntry:
    """The cache after a pinned prefix, which nothing changes any more, and the logits of its last token."""

    cache: BudgetedCache
    logits: Logits

    @cached_property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.cache.nbytes


class PrefixCache:
    """Pinned prefixes, and an entry for each that has been prefilled under the active plan.

    `version` changes whenever a prefix or an entry does.
    """

    def __init__(self, plan: BudgetPlan) -> None:
        self._plan = plan
        self._entries: dict[Prefix, PrefixCacheEntry | None] = {}
        self.version = 0

    @property
    def pinned(self) -> list[Prefix]:
        """All pinned prefixes."""
        return list(self._entries)

    @property
    def pending(self) -> list[Prefix]:
        """Pinned prefixes without an entry."""
        return [prefix for prefix, entry in self._entries.items() if entry is None]

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all entries."""
        return sum(entry.nbytes for entry in self._entries.values() if entry)

    def pin(self, prefix: Prefix) -> None:
        """Prefill this prefix on its own from now on, and keep its cache."""
        self._entries.setdefault(prefix, None)
        self.version += 1

    def match(self, prompt: Sequence[int]) -> Prefix | None:
        """Return the longest pinned prefix that a prompt starts with."""
        matches = [prefix for prefix in self._entries if tuple(prompt[: len(prefix)]) == prefix]
        return max(matches, key=len, default=None)

    def get(self, prefix: Prefix) -> PrefixCacheEntry | None:
        """Return a prefix's entry, None if it has not been prefilled yet."""
        return self._entries.get(prefix)

    def put(self, prefix: Prefix, entry: PrefixCacheEntry) -> None:
        """Keep the entry of a pinned prefix, unless it was prefilled under another plan."""
        if entry.cache.plan is self._plan:
            self._entries[prefix] = entry
            self.version += 1

    def invalidate(self, plan: BudgetPlan) -> list[Prefix]:
        """Drop all entries because `plan` is active now. Return their prefixes, which stay pinned."""
        dropped = [prefix for prefix, entry in self._entries.items() if entry is not None]
        self._entries, self._plan = dict.fromkeys(self._entries), plan
        self.version += 1
        return dropped
