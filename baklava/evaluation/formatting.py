"""Numbers as text, and as JSON."""

import math
from collections.abc import Mapping
from typing import Any

from baklava.evaluation.bootstrap import Interval


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
