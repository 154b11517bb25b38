"""KV heads that share a budget. `head_group` makes the kind of group that an eviction method needs."""

from baklava.attention import Heads
from baklava.eviction import Eviction
from baklava.heads.base import Budget, HeadGroup, Tokens
from baklava.heads.observing import Forward, Scorekeeper, first_sampled, observe
from baklava.heads.ranked import Ranked
from baklava.heads.ring import Ring
from baklava.heads.together import joinable, step_together

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
