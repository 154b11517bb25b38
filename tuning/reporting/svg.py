"""Inline SVG, coloured by the page's CSS variables so that it follows its light and dark themes."""

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

STYLE = Path(__file__).parent / "templates" / "style.css"

LEAST = 1e-9
"""What a logarithmic scale takes for 0."""

Scale = Callable[[float], float]


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    """Words that start at, end at or are centred on ("middle") a place."""
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(words)}</text>'


def leaning(x: float, y: float, words: str) -> str:
    """Words that end at a place, rising to it."""
    at = f'x="{x:.1f}" y="{y:.1f}" transform="rotate(-40 {x:.1f} {y:.1f})"'
    return f'<text {at} text-anchor="end">{escape(words)}</text>'


def level(y: float, left: float, right: float, words: str) -> str:
    """A line across a chart, with words at its left end."""
    line = f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + text(left - 8, y + 4, words, "end")


def upright(x: float, top: float, bottom: float, words: str, kind: str = "grid") -> str:
    """A line down a chart, with words below it."""
    line = f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
    return line + text(x, bottom + 16, words, "middle")


def dot(kind: str, x: float, y: float, radius: float, told: str) -> str:
    """A dot that says what it is where a pointer rests on it."""
    at = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius}"'
    return f'<circle class="{kind}" {at}><title>{escape(told)}</title></circle>'


def diamond(kind: str, x: float, y: float, radius: float, told: str) -> str:
    """The same on its corner."""
    corners = f"M{x:.1f},{y - radius:.1f}l{radius},{radius}l{-radius},{radius}l{-radius},{-radius}z"
    return f'<path class="{kind}" d="{corners}"><title>{escape(told)}</title></path>'


def group(x: float, y: float, parts: Sequence[str]) -> str:
    """Parts that are moved together."""
    return f'<g transform="translate({x:.1f} {y:.1f})">{"".join(parts)}</g>'


def svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    """A picture of these parts, as wide as its place; `label` says what it shows to those who cannot see it."""
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def standalone(picture: str) -> str:
    """A picture as a file of its own: with the page's style, and on the page's ground."""
    ground = '<rect width="100%" height="100%" fill="var(--page)"/>'
    head, body = picture.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STYLE.read_text()}</style>{ground}{body}'


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """A logarithmic scale from values to places."""
    bottom = math.log(max(low, LEAST))
    span = max(LEAST, math.log(max(high, LEAST)) - bottom)
    return lambda value: start + (math.log(max(value, LEAST)) - bottom) / span * (end - start)


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """A linear scale from values to places."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def round_values(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two values, about so many of them."""
    rough = max((high - low) / count, 1e-12)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough * (1 - 1e-9))
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_values(low: float, high: float) -> list[float]:
    """Round numbers between two values on a logarithmic scale."""
    low = max(low, LEAST)
    if high < 4 * low:
        return round_values(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    times = (1, 2, 3, 5) if high < 12 * low else (1, 2, 5) if high < 1000 * low else (1,)
    return [found for power in powers for each in times if low <= (found := each * 10.0**power) <= high]
