"""DuoAttention: the whole context for retrieval heads, a recent window for the others."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from baklava.allocation.base import Allocation, AllocationResult, Limits
from baklava.allocation.profile_measures import get_ranking, log_scores, mean_counts
from baklava.profiling.profile import Profile


@dataclass(frozen=True)
class DuoAttention(Allocation):
    """Retrieval heads keep the whole context, streaming heads a recent window (DuoAttention, arXiv 2410.10819).

    As many heads are retrieval heads as the budget allows if all others keep sinks and `tokens` recent entries; the
    others share the rest. The paper learns which heads they are. Here they are those that need most entries to repeat
    the context.
    """

    name: ClassVar[str] = "duo_attention"

    tokens: int = 128

    def __post_init__(self) -> None:
        self.require(self.tokens >= 1, "tokens must be at least 1")

    @override
    def allocate(self, profile: Profile, limits: Limits) -> AllocationResult:
        heads, total, whole = limits.num_heads, limits.total_entries, float(limits.max_tokens)
        recent = max(float(limits.min_tokens), min(limits.eviction.sinks + self.tokens, total / heads, whole))
        num_retrieval = heads if recent >= whole else min(heads, int((total - heads * recent) // (whole - recent)))
        num_streaming = heads - num_retrieval
        streaming_entries = min((total - num_retrieval * whole) / max(1, num_streaming), whole)
        # Heads by the entries that they need to repeat the context; heads with equal counts by their scores.
        counts = mean_counts(profile, "reconstruction", limits)
        scores = log_scores(profile, get_ranking(profile, "reconstruction")).mean((0, 3))
        by_need = np.lexsort((-scores.ravel(), -counts.ravel()))
        entries = np.full(counts.shape, streaming_entries)
        entries.flat[by_need[:num_retrieval]] = whole
        return AllocationResult.with_bits(entries, limits.bits)
