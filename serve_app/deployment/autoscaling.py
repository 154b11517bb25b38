"""How many replicas a server needs: as many as hold all that is running and waiting, with some room left."""

import math
from typing import Any

LOAD = "load"
"""Name of what a replica reports: bytes that it has promised or would have to, over its pool."""

TARGET = 0.8
"""Share of all pools together that is to be promised; above it replicas are added."""


def load(promised_bytes: int, waiting: int, bytes_per_sequence: int, pool_bytes: int) -> float:
    """Pools that a replica would fill if it let in all who wait, each at a whole budget; above 1 it is too small."""
    return (promised_bytes + waiting * bytes_per_sequence) / pool_bytes


def replicas_for(context: Any) -> tuple[int, dict[str, Any]]:
    """What Ray Serve's autoscaler calls: the replicas that are wanted, before its bounds and delays."""
    loads = context.aggregated_metrics.get(LOAD, {})
    if not loads:
        return context.target_num_replicas, {}
    return max(1, math.ceil(sum(loads.values()) / TARGET)), {}
