"""Means with intervals: windows of one document are not independent, so documents are what is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    drawn = _drawn(len(sums), seed)
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return Interval(mean, float(low), float(high), len(values), len(sums))


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
    return Interval(mean, float(low), float(high), len(values), len(above))


def _drawn(documents: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(documents, size=(DRAWS, documents))


def _over(above: Any, below: Any) -> Any:
    return np.where(below > 0, above / np.where(below > 0, below, 1), np.inf)


def _by_document(values: Sequence[float], documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    names = sorted(set(documents))
    of = np.array([names.index(document) for document in documents])
    return np.bincount(of, weights=values), np.bincount(of)
