"""Sizes that are searched where no budget was given."""

from baklava.eviction import HeavyHitter
from baklava.geometry import CacheGeometry
from baklava.plan import head_bytes
from baklava.sizes import FULL_BITS, full_bytes, sliding_bytes
from tuning.settings import CENTROIDS

SMALLEST, LARGEST = 0.02, 0.6
"""Shares of the full cache's bytes: what is worth searching, if a model and its texts leave that much room."""

ROOM = 1.5
"""The smallest size over one in which no entry of a head competes."""


def sizes_of(geometry: CacheGeometry, context_length: int) -> tuple[float, float]:
    """The least and the largest budget to draw: all that is drawn fits into the least, in 16 bits too."""
    choice = HeavyHitter(centroids=max(CENTROIDS)).choice
    heads = len(geometry.budgetable) * geometry.kv_heads
    needed = heads * head_bytes(geometry, choice.minimum_tokens, FULL_BITS, FULL_BITS, choice)
    least = ROOM * (needed + sliding_bytes(geometry, FULL_BITS)) / full_bytes(geometry, context_length)
    smallest = min(1.0, max(SMALLEST, least))
    return smallest, min(1.0, max(LARGEST, 2 * smallest))
