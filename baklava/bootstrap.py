"""Means with intervals: windows of one document are not independent, so documents are what is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 4000


@dataclass(frozen=True)
class Interval:
    """A mean over windows and its 95 % bootstrap interval over documents; NaN bounds when there is one document."""

    mean: float
    low: float
    high: float
    windows: int
    documents: int


def interval(values: Sequence[float], documents: Sequence[str], seed: int = 0) -> Interval:
    """Bootstrap the mean of one value per window, drawing documents with replacement (Efron's percentile interval)."""
    sums, counts = _by_document(values, documents)
    mean = float(np.mean(values))
    if len(sums) < 2:
        return Interval(mean, float("nan"), float("nan"), len(values), len(sums))
    drawn = np.random.default_rng(seed).integers(len(sums), size=(DRAWS, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(mean, float(low), float(high), len(values), len(sums))


def _by_document(values: Sequence[float], documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    names = sorted(set(documents))
    of = np.array([names.index(document) for document in documents])
    return np.bincount(of, weights=values), np.bincount(of)
