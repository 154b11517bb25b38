"""How many replicas a server needs for the sequences that run and wait."""

import math
from typing import Any

LOAD_METRIC = "load"
"""Name of what a replica reports to the autoscaler, see `pool_load`."""

TARGET_LOAD = 0.8
"""Replicas are added if the mean load of the pools is above this."""


def pool_load(reserved_bytes: int, waiting: int, bytes_per_sequence: int, pool_bytes: int) -> float:
    """Return the share of a pool that would be reserved if every waiting request was admitted; it may exceed 1."""
    return (reserved_bytes + waiting * bytes_per_sequence) / pool_bytes


def target_replicas(context: Any) -> tuple[int, dict[str, Any]]:
    """Return the number of replicas for Ray Serve's autoscaler, before its bounds and delays."""
    loads = context.aggregated_metrics.get(LOAD_METRIC, {})
    if not loads:
        return context.target_num_replicas, {}
    return max(1, math.ceil(sum(loads.values()) / TARGET_LOAD)), {}
