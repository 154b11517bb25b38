"""KV heads that share a budget. `head_group` makes the kind of group that an eviction method needs."""

from baklava.cache.attention import Heads
from baklava.cache.head_groups.base import Budget, HeadGroup, Tokens
from baklava.cache.head_groups.batched_decode import joinable, step_together
from baklava.cache.head_groups.ring_buffer import Ring
from baklava.cache.head_groups.score_updates import Forward, Scorekeeper, first_sampled, observe
from baklava.cache.head_groups.scored import Ranked
from baklava.eviction import Eviction

__all__ = [
    "Budget",
    "Forward",
    "HeadGroup",
    "Ranked",
    "Ring",
    "Scorekeeper",
    "Tokens",
    "first_sampled",
    "head_group",
    "joinable",
    "observe",
    "step_together",
]


def head_group(budget: Budget, eviction: Eviction, like: Heads, room: int | None = None) -> HeadGroup:
    """The kind of group that an eviction method needs."""
    return (Ranked if eviction.scored else Ring)(budget, eviction, like, room)
