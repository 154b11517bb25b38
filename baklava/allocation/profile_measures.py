"""What a profile says of each head, for allocation methods: its importance, and its entries above a score threshold.

Importance is that of BaKlaVa (arXiv 2502.13176). Thresholds are those of KVzip (arXiv 2505.23416), which keeps, over
all heads of a prompt, the entries above one threshold. Here the counts of the calibration windows are averaged, and the
average is the plan of every prompt.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from baklava.allocation.base import HeadGrid, Limits, missing_profile_error
from baklava.errors import UserError
from baklava.profiling.profile import ImportanceSource, Profile, Ranking, RankingName

Scores = Float[np.ndarray, "windows layers kv_heads ranks"]

REDUCTIONS: dict[str, Callable[..., np.ndarray]] = {"mean": np.mean, "max": np.max, "sum": np.sum}
"""How the query group of a KV head is reduced."""

_TIE_SLOPE = 1e-6
"""Decrease of a score per e-fold of its rank if scores are equal, so that a threshold separates ties."""


def head_importance(profile: Profile, source: ImportanceSource = "value", reduction: str = "mean") -> HeadGrid:
    """Return the importance of each budgeted KV head, at least 0.

    Raises:
        UserError: the profile lacks this source.
    """
    if source not in profile.importance:
        raise UserError(
            f"the profile of {profile.model.id} has no source {source!r}; choose one of {', '.join(profile.importance)}"
        )
    geometry = profile.geometry
    importance = np.array(profile.importance[source])[list(geometry.full_attention_layers)]
    grouped = importance.reshape(-1, geometry.kv_heads, geometry.query_group)
    return np.maximum(REDUCTIONS[reduction](grouped, axis=2), 0)


def layer_importance(profile: Profile) -> Float[np.ndarray, "layers 1"]:
    """Return the importance of each budgeted layer, above 0, since powers of it may be negative."""
    return np.maximum(np.array(profile.layer_importance)[list(profile.geometry.full_attention_layers)], 1e-6)[:, None]


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
