"""Counting the entries above a threshold: how a ranking of entries becomes a number of entries per head.

KVzip (arXiv 2505.23416) keeps, over all heads of a prompt, the entries above one threshold. Here the counts of the
calibration windows are averaged, and the average is the plan of every prompt.
"""

import numpy as np
from jaxtyping import Float

from baklava.allocation.base import Grid, Limits, lacking
from baklava.profiling.profile import Profile, Ranker, Ranking

Scores = Float[np.ndarray, "windows layers kv_heads ranks"]

_TIE = 1e-6
"""What a score falls by when its rank grows e-fold and the score is the same: ties are cut like anything else."""


def averaged_counts(profile: Profile, ranker: Ranker, limits: Limits, floor: float = 0.0, tilt: float = 0.0) -> Grid:
    """Mean number of entries per head above the one threshold, a window, at which all heads hold `limits.total`.

    `floor` is the least share of a head, relative to the uniform one. `tilt` multiplies the scores by up to
    e^±(tilt / 2), evenly from the first layer to the last; above 0 favours late layers.

    Raises:
        UserError: the profile lacks this ranking.
    """
    ranking = ranking_of(profile, ranker)
    scores = scores_of(profile, ranking)
    windows, layers, kv_heads, ranks = scores.shape
    scores = scores + tilt * np.linspace(-0.5, 0.5, layers)[:, None, None]
    grouped = scores.reshape(windows, layers * kv_heads, ranks)
    counts = counts_meeting(limits.total, grouped, ranking, limits, floor)
    # a mean of equal numbers may be an ulp off
    return np.clip(counts.mean(0), limits.least, limits.most).reshape(layers, kv_heads)


def ranking_of(profile: Profile, ranker: Ranker) -> Ranking:
    """A ranking of the profile; raises UserError where it is missing."""
    if ranker not in profile.rankings:
        raise lacking(profile, f"{ranker} ranking")
    return profile.rankings[ranker]


def scores_of(profile: Profile, ranking: Ranking) -> Scores:
    """Logarithms of the scores of the budgeted layers, falling strictly from rank to rank."""
    layers = profile.geometry.budgetable
    scores = np.array([[window[layer] for layer in layers] for window in ranking.scores])
    return np.minimum.accumulate(scores, axis=-1) - _TIE * np.log(ranking.ranks)


def counts_meeting(
    total: float, scores: Float[np.ndarray, "groups heads ranks"], ranking: Ranking, limits: Limits, floor: float = 0.0
) -> Float[np.ndarray, "groups heads"]:
    """Entries per head above the one threshold, a group, at which the heads of the group hold `total` together.

    A count includes the sinks, which are not ranked, and is cut to what a head may hold. Ranks grow with the context:
    a head that keeps half of the entries of a calibration window keeps half of those of the plan.
    """
    least, most = limits.within(floor)
    sinks, ranks = limits.eviction.sinks, np.array(ranking.ranks)
    ranks = ranks * ((limits.most - sinks) / ranks[-1])
    low, high = scores.min((1, 2)) - 1, scores.max((1, 2)) + 1
    for _ in range(60):
        middle = (low + high) / 2
        held = np.clip(sinks + _above(middle, scores, ranks), least, most).sum(1)
        low, high = np.where(held > total, middle, low), np.where(held > total, high, middle)
    return np.clip(sinks + _above(high, scores, ranks), least, most)


def _above(
    thresholds: Float[np.ndarray, " groups"],
    scores: Float[np.ndarray, "groups heads ranks"],
    ranks: Float[np.ndarray, " ranks"],
) -> Float[np.ndarray, "groups heads"]:
    """How many entries score above a threshold: ln score is taken as linear in ln rank, and 0 above the best."""
    threshold = thresholds[:, None]
    above = (scores >= threshold[:, :, None]).sum(2)
    first = np.clip(above - 1, 0, max(0, len(ranks) - 2))
    second = np.minimum(first + 1, len(ranks) - 1)
    better, worse = (np.take_along_axis(scores, rank[:, :, None], 2)[:, :, 0] for rank in (first, second))
    part = np.clip((better - threshold) / np.maximum(better - worse, 1e-12), 0, 1)
    between = np.exp(np.log(ranks[first]) * (1 - part) + np.log(ranks[second]) * part)
    # Fades out above the best score, so that a total is met however coarse the ranks.
    return between * np.clip(1 + better - threshold, 0, 1) ** (above == 0)
