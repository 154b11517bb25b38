"""What a profile says of how much heads and layers change what passes through them (BaKlaVa, arXiv 2502.13176)."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from baklava.allocation.base import Grid
from baklava.errors import UserError
from baklava.profiling.profile import Profile, Source

REDUCTIONS: dict[str, Callable[..., np.ndarray]] = {"mean": np.mean, "max": np.max, "sum": np.sum}
"""How the query group of a KV head is joined."""


def head_importance(profile: Profile, source: Source = "value", reduction: str = "mean") -> Grid:
    """Importance per budgeted KV head, at least 0; raises UserError where the profile has no such source."""
    if source not in profile.importance:
        raise UserError(
            f"the profile of {profile.model.id} has no source {source!r}; choose one of {', '.join(profile.importance)}"
        )
    geometry = profile.geometry
    grid = np.array(profile.importance[source])[list(geometry.budgetable)]
    grouped = grid.reshape(-1, geometry.kv_heads, geometry.query_group)
    return np.maximum(REDUCTIONS[reduction](grouped, axis=2), 0)


def layer_importance(profile: Profile) -> Float[np.ndarray, "layers 1"]:
    """Importance per budgeted layer, above 0, since powers of it may be negative."""
    return np.maximum(np.array(profile.layer_importance)[list(profile.geometry.budgetable)], 1e-6)[:, None]
