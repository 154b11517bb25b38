"""Means with bootstrap intervals over documents, because windows of one document are not independent, and as text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_RESAMPLES = 4000
Z_95 = 1.96
"""The normal quantile of a 95 % interval."""


@dataclass(frozen=True)
class Interval:
    """A mean over windows and its 95 % bootstrap interval over documents; the bounds of one document are NaN."""

    mean: float
    low: float
    high: float
    windows: int
    documents: int


def bootstrap_mean(values: Sequence[float], documents: Sequence[str], seed: int = 0) -> Interval:
    """Bootstrap the mean of one value per window by resampling documents (Efron's percentile interval).

    Percentiles of few documents lie too close together: of four normal ones, 79 % of the intervals cover the mean. So
    their distance from the mean is scaled up to match Student's t.
    """
    sums, counts = _sums_by_document(values, documents)
    mean = float(np.mean(values))
    if len(sums) < 2:
        return Interval(mean, float("nan"), float("nan"), len(values), len(sums))
    samples = _resample(len(sums), seed)
    low, high = np.percentile(sums[samples].sum(1) / counts[samples].sum(1), [2.5, 97.5])
    return Interval(mean, *_widen(mean, low, high, len(sums)), len(values), len(sums))


def bootstrap_ratio(
    numerator: Sequence[float], denominator: Sequence[float], documents: Sequence[str], seed: int = 0
) -> Interval:
    """Bootstrap the ratio of two means over the same windows, both from the same resampled documents.

    The ratio is infinite if the denominator's mean is not positive, else 0 if the numerator's is not. Its bounds are
    widened on the log scale, on which a ratio and its inverse are alike, so that none is below 0.
    """
    upper, lower = (_sums_by_document(values, documents)[0] for values in (numerator, denominator))
    mean = float(_divide(upper.sum(), lower.sum()))
    if len(upper) < 2:
        return Interval(mean, float("nan"), float("nan"), len(numerator), len(upper))
    samples = _resample(len(upper), seed)
    ratios = _divide(upper[samples].sum(1), lower[samples].sum(1))
    low, high = np.percentile(ratios, [2.5, 97.5], method="nearest")  # interpolating between infinities gives NaN
    with np.errstate(divide="ignore"):  # the logarithm of 0 is a bound too
        low, high = _widen(np.log(mean), np.log(low), np.log(high), len(upper))
    return Interval(mean, math.exp(low), math.exp(high), len(numerator), len(upper))


def _widen(mean: float, low: float, high: float, documents: int) -> tuple[float, float]:
    """Scale the distance of both bounds from the mean for a small number of documents; infinite bounds stay."""
    freedom = documents - 1
    # Expansion of the t quantile around the normal one, accurate to 1 % from four documents on.
    quantile = Z_95 + (Z_95**3 + Z_95) / (4 * freedom) + (5 * Z_95**5 + 16 * Z_95**3 + 3 * Z_95) / (96 * freedom**2)
    quantile += (3 * Z_95**7 + 19 * Z_95**5 + 17 * Z_95**3 - 15 * Z_95) / (384 * freedom**3)
    scale = quantile / Z_95 * (documents / freedom) ** 0.5
    low, high = (
        float(bound) if np.isinf(bound) or np.isinf(mean) else float(mean + scale * (bound - mean))
        for bound in (low, high)
    )
    return low, high


def _resample(documents: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(documents, size=(NUM_RESAMPLES, documents))


def _divide(upper: Any, lower: Any) -> Any:
    return np.where(lower > 0, np.maximum(upper, 0) / np.where(lower > 0, lower, 1), np.inf)


def _sums_by_document(values: Sequence[float], documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    names = sorted(set(documents))
    index = np.array([names.index(document) for document in documents])
    return np.bincount(index, weights=values), np.bincount(index)


def format_mebibytes(count: int) -> str:
    """Format bytes in MiB."""
    return f"{count / 2**20:.1f} MiB"


def format_bounds(interval: Interval, spec: str) -> str:
    """Format the bounds in brackets; the empty string if they are NaN."""
    return "" if math.isnan(interval.low) else f"[{interval.low:{spec}}, {interval.high:{spec}}]"


def format_interval(interval: Interval, spec: str) -> str:
    """Format the mean and, if there are any, its bounds."""
    # + 0.0 turns -0.0 into 0.0
    return f"{interval.mean + 0.0:{spec}} {format_bounds(interval, spec)}".rstrip()


def format_perplexity_change(loss: Interval) -> str:
    """Format a loss in nats per token as a relative change of perplexity, with its interval."""
    mean, low, high = (round(100 * math.expm1(value), 1) + 0.0 for value in (loss.mean, loss.low, loss.high))
    return f"{mean:+.1f} %" + ("" if math.isnan(low) else f" [{low:.1f}, {high:.1f}]")


def format_share(share: float, digits: int = 3) -> str:
    """Format a share without trailing zeros: `30%`, `12.5%`, `6.25%`."""
    return f"{100 * share:.{digits}g}%"


def pluralize(count: int, noun: str) -> str:
    """Return `1 window`, `2 windows`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def nan_to_null(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace NaN, which JSON does not have, by None: a bound that one document cannot give."""
    return {name: None if value != value else value for name, value in values.items()}
