"""Figures as people read them."""

import math

from baklava.evaluation.bootstrap import Interval


def mebibytes(count: int) -> str:
    """Bytes in MiB."""
    return f"{count / 2**20:.1f} MiB"


def bounds(found: Interval, form: str) -> str:
    """The interval in brackets; nothing where one document gives none."""
    return "" if math.isnan(found.low) else f"[{found.low:{form}}, {found.high:{form}}]"


def with_bounds(found: Interval, form: str) -> str:
    """The mean and its interval."""
    return f"{found.mean + 0.0:{form}} {bounds(found, form)}".rstrip()


def percent(loss: Interval) -> str:
    """A loss in nats per token as a change of perplexity, with its interval."""
    # + 0.0 turns a rounded -0.0 into 0.0
    mean, low, high = (round(100 * math.expm1(value), 1) + 0.0 for value in (loss.mean, loss.low, loss.high))
    return f"{mean:+.1f} %" + ("" if math.isnan(low) else f" [{low:.1f}, {high:.1f}]")


def share(part: float, digits: int = 3) -> str:
    """A share of the bytes, without zeros at its end: `30%`, `12.5%`, `6.25%`."""
    return f"{100 * part:.{digits}g}%"


def counted(count: int, noun: str) -> str:
    """`1 window`, `2 windows`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
