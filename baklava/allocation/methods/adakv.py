"""The same for every layer, and within a layer more for the heads that look further."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from baklava.allocation.base import Allocation, Limits, Shares
from baklava.allocation.score_thresholds import counts_meeting, ranking_of, scores_of
from baklava.profiling.profile import Profile


@dataclass(frozen=True)
class HeadAdaptive(Allocation):
    """Heads of a layer share one threshold of the attention received (Ada-KV, arXiv 2407.11550), layers are equal.

    Ada-KV does so for each prompt and with scores of its own; here the scores are those of `HeavyHitter()`, and the
    counts of the calibration windows are averaged. `safeguard` is the part of the entries that all heads get alike, as
    in the paper, whose alpha is its counterpart.
    """

    name: ClassVar[str] = "head_adaptive"

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        self.check(0 <= self.safeguard <= 1, "safeguard must be within [0, 1]")

    @override
    def shares(self, profile: Profile, limits: Limits) -> Shares:
        ranking = ranking_of(profile, "heavy_hitter")
        scores = scores_of(profile, ranking)
        windows, layers, kv_heads, ranks = scores.shape
        grouped = scores.reshape(windows * layers, kv_heads, ranks)
        counts = counts_meeting(limits.total / layers, grouped, ranking, limits)
        adaptive = counts.reshape(windows, layers, kv_heads).mean(0)
        uniform = min(limits.total / limits.heads, limits.most)
        entries = self.safeguard * uniform + (1 - self.safeguard) * adaptive
        return Shares.of(np.clip(entries, limits.least, limits.most), limits.bits)  # a sum of parts may be an ulp off
