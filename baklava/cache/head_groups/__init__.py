"""KV heads that share a budget. `head_group` makes the kind of group that an eviction method needs."""

from baklava.cache.attention import KVStates
from baklava.cache.head_groups.base import GroupBudget, HeadGroup, NewTokens
from baklava.cache.head_groups.layer_table import LayerTable
from baklava.cache.head_groups.references import (
    PromptEntries,
    ReferenceQueries,
    References,
    ReferenceSample,
    observe_references,
)
from baklava.cache.head_groups.ring_buffer import RingBufferHeadGroup
from baklava.cache.head_groups.score_updates import (
    AttentionInputs,
    ScoreAccumulator,
    first_sampled_query,
    update_scores,
)
from baklava.cache.head_groups.scored import ScoredHeadGroup
from baklava.eviction import Eviction

__all__ = [
    "AttentionInputs",
    "GroupBudget",
    "HeadGroup",
    "LayerTable",
    "NewTokens",
    "PromptEntries",
    "ReferenceQueries",
    "ReferenceSample",
    "References",
    "RingBufferHeadGroup",
    "ScoreAccumulator",
    "ScoredHeadGroup",
    "first_sampled_query",
    "head_group",
    "observe_references",
    "update_scores",
]


def head_group(budget: GroupBudget, eviction: Eviction, template: KVStates, max_tokens: int | None = None) -> HeadGroup:
    """Return the kind of group that the eviction method needs."""
    return (ScoredHeadGroup if eviction.scored else RingBufferHeadGroup)(budget, eviction, template, max_tokens)
