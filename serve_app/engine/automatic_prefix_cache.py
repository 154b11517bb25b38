"""Automatic prefix caching: KV caches after whole chunks of earlier prompts, which later prompts continue from a copy.

With chunked prefill, what a cache holds after a chunk depends on nothing but the plan and the tokens up to there. So an
answer does not depend on whether its prompt continued a copy or was prefilled from its start.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from baklava.cache.budgeted_cache import BudgetedCache

MAX_SEEN = 1 << 16
"""Ends of chunks of earlier prompts that are remembered without a cache; 32 bytes each."""


@dataclass(frozen=True)
class ChunkEnd:
    """The end of a chunk of a prompt: the number of tokens up to there, and the hash of all of them."""

    num_tokens: int
    key: bytes


def chunk_ends(prompt: Sequence[int], chunk_size: int, salt: str) -> list[ChunkEnd]:
    """Return the ends of the chunks of a prompt after which there is at least one more token.

    Args:
        prompt: Token ids.
        chunk_size: Tokens of a chunk.
        salt: Prompts with another salt have other keys.
    """
    ends, key = [], hashlib.sha256(salt.encode()).digest()
    for stop in range(chunk_size, len(prompt), chunk_size):
        key = hashlib.sha256(key + array("q", prompt[stop - chunk_size : stop]).tobytes()).digest()
        ends.append(ChunkEnd(stop, key))
    return ends


class AutomaticPrefixCache:
    """The caches of earlier prompts by the end of their last chunk, the least recently used first."""

    def __init__(self) -> None:
        self._caches: OrderedDict[bytes, BudgetedCache] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    @property
    def keys(self) -> Collection[bytes]:
        """Keys of all caches."""
        return self._caches.keys()

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all caches."""
        return sum(cache.nbytes for cache in self._caches.values())

    def match(self, ends: Sequence[ChunkEnd]) -> tuple[ChunkEnd, BudgetedCache] | None:
        """Return the last of these ends that has a cache, and the cache, which counts as used now."""
        for end in reversed(ends):
            if (cache := self._caches.get(end.key)) is not None:
                self._caches.move_to_end(end.key)
                return end, cache
        return None

    def worth_keeping(self, ends: Sequence[ChunkEnd]) -> list[ChunkEnd]:
        """Return the ends at which a prompt's cache should be kept, and remember that it had all of them.

        The last one serves the next turn of a chat, or another question about a document. The last that an earlier
        prompt had as well is the end of what both share.
        """
        shared = [end for end in ends if end.key in self._seen]
        for end in ends:
            self._seen[end.key] = None
            self._seen.move_to_end(end.key)
        while len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        kept = {end.key: end for end in (*shared[-1:], *ends[-1:])}
        return [end for end in kept.values() if end.key not in self._caches]

    def put(self, key: bytes, cache: BudgetedCache) -> None:
        """Keep a cache, which nothing changes any more."""
        self._caches[key] = cache

    def evict(self, keep: bytes | None = None) -> bytes | None:
        """Drop the least recently used cache but `keep`, and return its key; None if there is no other."""
        key = next((key for key in self._caches if key != keep), None)
        if key is not None:
            del self._caches[key]
        return key

    def clear(self) -> list[bytes]:
        """Drop all caches, and return their keys."""
        keys = list(self._caches)
        self._caches.clear()
        return keys
