"""AdaKV: equal layers, and within a layer more entries for heads whose attention is spread wider."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from baklava.allocation.base import Allocation, AllocationResult, Limits
from baklava.allocation.profile_measures import counts_at_threshold, get_ranking, log_scores
from baklava.profiling.profile import Profile


@dataclass(frozen=True)
class AdaKV(Allocation):
    """Heads of a layer share one threshold of the attention received (Ada-KV, arXiv 2407.11550); layers are equal.

    Ada-KV applies this to each prompt with its own scores. Here the scores are those of `HeavyHitter()`, and the counts
    of the calibration windows are averaged. `safeguard` is the part of the entries that is spread uniformly, as in the
    paper (1 - alpha).
    """

    name: ClassVar[str] = "adakv"

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        self.require(0 <= self.safeguard <= 1, "safeguard must be within [0, 1]")

    @override
    def allocate(self, profile: Profile, limits: Limits) -> AllocationResult:
        ranking = get_ranking(profile, "heavy_hitter")
        scores = log_scores(profile, ranking)
        windows, layers, kv_heads, ranks = scores.shape
        grouped = scores.reshape(windows * layers, kv_heads, ranks)
        counts = counts_at_threshold(limits.total_entries / layers, grouped, ranking, limits)
        adaptive = counts.reshape(windows, layers, kv_heads).mean(0)
        uniform = min(limits.total_entries / limits.num_heads, limits.max_tokens)
        entries = self.safeguard * uniform + (1 - self.safeguard) * adaptive
        # a sum of parts may be an ulp off
        return AllocationResult.with_bits(np.clip(entries, limits.min_tokens, limits.max_tokens), limits.bits)
