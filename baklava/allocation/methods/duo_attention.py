"""Everything for some heads, a recent window for the others."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int
from typing_extensions import override

from baklava.allocation.base import Allocation, Limits, Shares
from baklava.allocation.score_thresholds import averaged_counts, ranking_of, scores_of
from baklava.profiling.profile import Profile


@dataclass(frozen=True)
class Duo(Allocation):
    """Retrieval heads keep the whole context, streaming heads the recent part (DuoAttention, arXiv 2410.10819).

    As many heads are retrieval heads as the bytes hold beside `tokens` recent entries in all others, which share what
    is left. The paper learns which they are; here they are those that need most entries to repeat the context.
    """

    name: ClassVar[str] = "duo"

    tokens: int = 128

    def __post_init__(self) -> None:
        self.check(self.tokens >= 1, "tokens must be at least 1")

    @override
    def shares(self, profile: Profile, limits: Limits) -> Shares:
        whole = float(limits.most)
        recent = max(float(limits.least), min(limits.eviction.sinks + self.tokens, limits.total / limits.heads, whole))
        spare = limits.total - limits.heads * recent
        retrieving = limits.heads if recent >= whole else min(limits.heads, int(spare // (whole - recent)))
        streaming = limits.heads - retrieving
        left = min((limits.total - retrieving * whole) / max(1, streaming), whole)
        entries = np.full((len(profile.geometry.budgetable), profile.geometry.kv_heads), left)
        entries.flat[_by_need(profile, limits)[:retrieving]] = whole
        return Shares.of(entries, limits.bits)


def _by_need(profile: Profile, limits: Limits) -> Int[np.ndarray, " heads"]:
    """Heads, those first that have most entries above a threshold; of equal ones those whose entries score higher."""
    needed = averaged_counts(profile, "reconstruction", limits)
    scores = scores_of(profile, ranking_of(profile, "reconstruction")).mean((0, 3))
    return np.lexsort((-scores.ravel(), -needed.ravel()))
