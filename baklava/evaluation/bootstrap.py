"""Means with intervals: windows of one document are not independent, so documents are what is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 4000
Z = 1.96
"""The normal quantile of a 95 % interval."""


@dataclass(frozen=True)
class Interval:
    """A mean over windows and its 95 % bootstrap interval over documents; NaN bounds when there is one document."""

    mean: float
    low: float
    high: float
    windows: int
    documents: int


def interval(values: Sequence[float], documents: Sequence[str], seed: int = 0) -> Interval:
    """Bootstrap the mean of one value per window, drawing documents with replacement (Efron's percentile interval).

    Percentiles of few documents lie too near to each other (of four normal ones, 79 % of the intervals hold the mean),
    so their distance from the mean is scaled as Student's t asks for.
    """
    sums, counts = _by_document(values, documents)
    mean = float(np.mean(values))
    if len(sums) < 2:
        return Interval(mean, float("nan"), float("nan"), len(values), len(sums))
    drawn = _drawn(len(sums), seed)
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return Interval(mean, *_widened(mean, low, high, len(sums)), len(values), len(sums))


def ratio(values: Sequence[float], over: Sequence[float], documents: Sequence[str], seed: int = 0) -> Interval:
    """The mean of `values` over the mean of `over` on the same windows, both from the same drawn documents.

    Infinite where the mean below is not above 0: there is nothing to be a multiple of.
    """
    above, below = (_by_document(each, documents)[0] for each in (values, over))
    mean = float(_over(above.sum(), below.sum()))
    if len(above) < 2:
        return Interval(mean, float("nan"), float("nan"), len(values), len(above))
    drawn = _drawn(len(above), seed)
    found = _over(above[drawn].sum(1), below[drawn].sum(1))
    low, high = np.percentile(found, [2.5, 97.5], method="nearest")  # interpolating between infinities gives NaN
    return Interval(mean, *_widened(mean, low, high, len(above)), len(values), len(above))


def _widened(mean: float, low: float, high: float, documents: int) -> tuple[float, float]:
    """Bounds as far from the mean as so few documents make them; infinite ones stay."""
    freedom = documents - 1
    # Expansion of the t quantile around the normal one, within 1 % from four documents on.
    quantile = Z + (Z**3 + Z) / (4 * freedom) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)
    quantile += (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / (384 * freedom**3)
    wider = quantile / Z * (documents / freedom) ** 0.5
    bounds = (
        float(bound) if np.isinf(bound) or np.isinf(mean) else mean + wider * (bound - mean) for bound in (low, high)
    )
    low, high = map(float, bounds)
    return low, high


def _drawn(documents: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(documents, size=(DRAWS, documents))


def _over(above: Any, below: Any) -> Any:
    return np.where(below > 0, above / np.where(below > 0, below, 1), np.inf)


def _by_document(values: Sequence[float], documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    names = sorted(set(documents))
    of = np.array([names.index(document) for document in documents])
    return np.bincount(of, weights=values), np.bincount(of)
