"""Inline SVG, coloured by the page's CSS variables so that it follows its light and dark themes."""

from collections.abc import Sequence
from html import escape


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    """Words that start at, end at or are centred on ("middle") a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    """A picture of these parts, as wide as its place; `label` says what it shows to those who cannot see it."""
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
