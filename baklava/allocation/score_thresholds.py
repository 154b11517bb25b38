"""Allocation by score thresholds: a head gets as many entries as score above a threshold that it shares with others.

KVzip (arXiv 2505.23416) keeps, over all heads of a prompt, the entries above one threshold. Here the counts of the
calibration windows are averaged, and the average is the plan of every prompt.

- `HeavyHitterCounts`, `ReconstructionCounts`: one threshold for all heads.
- `AdaKV`: one threshold for the heads of a layer; layers are equal.
- `DuoAttention`: the heads with the largest counts keep the whole context, the others a recent window.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from typing_extensions import override

from baklava.allocation.base import Allocation, AllocationResult, HeadGrid, Limits, missing_profile_error
from baklava.profiling.profile import Profile, Ranking, RankingName

Scores = Float[np.ndarray, "windows layers kv_heads ranks"]

_TIE_SLOPE = 1e-6
"""Decrease of a score per e-fold of its rank if scores are equal, so that a threshold separates ties."""


@dataclass(frozen=True)
class ThresholdCounts(Allocation):
    """Entries above one score threshold over all heads, counted in each calibration window and averaged.

    Attributes:
        floor: minimum of a head, relative to the uniform share.
        layer_tilt: favours late layers if above 0, early layers if below; see `mean_counts`.
    """

    ranking: ClassVar[RankingName]

    floor: float = 0.1
    layer_tilt: float = 0.0

    def __post_init__(self) -> None:
        self.require(0 <= self.floor <= 1, "floor must be within [0, 1]")

    @override
    def allocate(self, profile: Profile, limits: Limits) -> AllocationResult:
        counts = mean_counts(profile, self.ranking, limits, self.floor, self.layer_tilt)
        return AllocationResult.with_bits(counts, limits.bits)


class HeavyHitterCounts(ThresholdCounts):
    """Counts by the attention received, as scored by `HeavyHitter()`; the idea is H2O's (arXiv 2306.14048)."""

    name: ClassVar[str] = "heavy_hitter_counts"
    ranking: ClassVar[RankingName] = "heavy_hitter"


class ReconstructionCounts(ThresholdCounts):
    """Counts by the attention received while the model repeats the context (KVzip, arXiv 2505.23416)."""

    name: ClassVar[str] = "reconstruction_counts"
    ranking: ClassVar[RankingName] = "reconstruction"


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


def mean_counts(
    profile: Profile, name: RankingName, limits: Limits, floor: float = 0.0, layer_tilt: float = 0.0
) -> HeadGrid:
    """Return the entries per head above a threshold, averaged over the windows; they sum to `limits.total_entries`.

    Args:
        profile: what was measured of the model.
        name: ranking whose scores are thresholded; each window has one threshold.
        limits: what the heads may hold.
        floor: minimum of a head, relative to the uniform share.
        layer_tilt: multiplies the scores by up to e^±(layer_tilt / 2), evenly from the first layer to the last;
            above 0 favours late layers.

    Raises:
        UserError: the profile lacks this ranking.
    """
    ranking = get_ranking(profile, name)
    scores = log_scores(profile, ranking)
    windows, layers, kv_heads, ranks = scores.shape
    scores = scores + layer_tilt * np.linspace(-0.5, 0.5, layers)[:, None, None]
    grouped = scores.reshape(windows, layers * kv_heads, ranks)
    counts = counts_at_threshold(limits.total_entries, grouped, ranking, limits, floor)
    # a mean of equal numbers may be an ulp off
    return np.clip(counts.mean(0), limits.min_tokens, limits.max_tokens).reshape(layers, kv_heads)


def get_ranking(profile: Profile, name: RankingName) -> Ranking:
    """Return a ranking of the profile; raises UserError if the profile lacks it."""
    if name not in profile.rankings:
        raise missing_profile_error(profile, f"{name} ranking")
    return profile.rankings[name]


def log_scores(profile: Profile, ranking: Ranking) -> Scores:
    """Return the logarithms of the scores of the budgeted layers, strictly decreasing from rank to rank."""
    layers = profile.geometry.full_attention_layers
    scores = np.array([[window[layer] for layer in layers] for window in ranking.scores])
    return np.minimum.accumulate(scores, axis=-1) - _TIE_SLOPE * np.log(ranking.ranks)


def counts_at_threshold(
    total: float, scores: Float[np.ndarray, "groups heads ranks"], ranking: Ranking, limits: Limits, floor: float = 0.0
) -> Float[np.ndarray, "groups heads"]:
    """Return the entries per head above one threshold per group, at which the heads of the group sum to `total`.

    A count includes the sinks, which are not ranked, and is clipped to what a head may hold. Ranks scale with the
    context: a head that keeps half of the entries of a calibration window keeps half of those of the plan.
    """
    lower, upper = limits.bounds(floor)
    sinks, ranks = limits.eviction.sinks, np.array(ranking.ranks)
    ranks = ranks * ((limits.max_tokens - sinks) / ranks[-1])
    low, high = scores.min((1, 2)) - 1, scores.max((1, 2)) + 1
    for _ in range(60):
        middle = (low + high) / 2
        entries = np.clip(sinks + _count_above(middle, scores, ranks), lower, upper).sum(1)
        low, high = np.where(entries > total, middle, low), np.where(entries > total, high, middle)
    return np.clip(sinks + _count_above(high, scores, ranks), lower, upper)


def _count_above(
    thresholds: Float[np.ndarray, " groups"],
    scores: Float[np.ndarray, "groups heads ranks"],
    ranks: Float[np.ndarray, " ranks"],
) -> Float[np.ndarray, "groups heads"]:
    """Return how many entries score above the threshold; ln score is linear in ln rank between ranks."""
    threshold = thresholds[:, None]
    above = (scores >= threshold[:, :, None]).sum(2)
    first = np.clip(above - 1, 0, max(0, len(ranks) - 2))
    second = np.minimum(first + 1, len(ranks) - 1)
    better, worse = (np.take_along_axis(scores, rank[:, :, None], 2)[:, :, 0] for rank in (first, second))
    part = np.clip((better - threshold) / np.maximum(better - worse, 1e-12), 0, 1)
    between = np.exp(np.log(ranks[first]) * (1 - part) + np.log(ranks[second]) * part)
    # Fades out above the best score, so that a total is met however coarse the ranks.
    return between * np.clip(1 + better - threshold, 0, 1) ** (above == 0)
