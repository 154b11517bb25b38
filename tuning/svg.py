"""Inline SVG, coloured by the page's CSS variables so that it follows its light and dark themes."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

STYLE = Path(__file__).with_name("style.css")


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    """Words that start at, end at or are centred on ("middle") a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def level(y: float, left: float, right: float, words: str) -> str:
    """A line across a chart, with words at its left end."""
    line = f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + text(left - 8, y + 4, words, "end")


def standalone(picture: str) -> str:
    """A picture as a file of its own: with the page's style, and on the page's ground."""
    ground = '<rect width="100%" height="100%" fill="var(--page)"/>'
    head, body = picture.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STYLE.read_text()}</style>{ground}{body}'


def svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    """A picture of these parts, as wide as its place; `label` says what it shows to those who cannot see it."""
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
