"""HTML pages from templates, and inline SVG in the colours of their style.

A page is one file that loads nothing and runs no script. Its SVG uses the CSS variables of `style.css`, so that both
follow the light and dark themes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from baklava.serialization import atomic_write_text

TEMPLATES = Path(__file__).parent / "templates"


def write_page(path: Path, template: str, fields: Mapping[str, str]) -> None:
    """Write a page whose content is a template.

    Args:
        path: The file.
        template: Its name in templates/.
        fields: The fields of the template, and the page's "title" and "lead", all of them HTML.
    """
    content = fill_template(template, fields)
    style, kind = (TEMPLATES / "style.css").read_text(), Path(template).stem
    page = fill_template("page.html", {**fields, "style": style, "kind": kind, "content": content})
    atomic_write_text(path, page)


def fill_template(template: str, fields: Mapping[str, str]) -> str:
    """Return a template with its fields filled in; a missing field is an error."""
    return Template((TEMPLATES / template).read_text()).substitute(fields)


def figures_html(values: Mapping[str, str]) -> str:
    """Return large figures with small names."""
    return "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in values.items())


def definitions_html(values: Mapping[str, object]) -> str:
    """Return names and values for a <dl>."""
    rows = []
    for name, value in values.items():
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        rows.append(f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(shown)}</dd>")
    return "".join(rows)


def commands_html(commands: Mapping[str, str]) -> str:
    """Return commands with what they do, for a <dl>."""
    return "".join(
        f"<dt>{escape(purpose)}</dt><dd><code>{escape(command)}</code></dd>" for purpose, command in commands.items()
    )


STYLESHEET = Path(__file__).parent / "templates" / "style.css"

MIN_LOG_VALUE = 1e-9
"""The smallest value that a logarithmic scale tells from 0."""

Scale = Callable[[float], float]
"""Maps a value to a coordinate in pixels."""


def text(x: float, y: float, content: str, anchor: str = "start", css_class: str = "") -> str:
    """Return text that starts at, ends at or is centred on (`anchor` "middle") a point."""
    style = f' class="{css_class}"' if css_class else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(content)}</text>'


def rotated_text(x: float, y: float, content: str) -> str:
    """Return slanted text that ends at a point, such as a long tick label."""
    position = f'x="{x:.1f}" y="{y:.1f}" transform="rotate(-40 {x:.1f} {y:.1f})"'
    return f'<text {position} text-anchor="end">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css_class: str) -> str:
    """Return a straight line."""
    return f'<line class="{css_class}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def hline(y: float, left: float, right: float, label: str) -> str:
    """Return a horizontal grid line with a label at its left end."""
    return line(left, y, right, y, "grid") + text(left - 8, y + 4, label, "end")


def vline(x: float, top: float, bottom: float, label: str, css_class: str = "grid") -> str:
    """Return a vertical grid line with a label below it."""
    return line(x, top, x, bottom, css_class) + text(x, bottom + 16, label, "middle")


def circle(css_class: str, x: float, y: float, radius: float, tooltip: str) -> str:
    """Return a circle with a tooltip."""
    position = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius}"'
    return f'<circle class="{css_class}" {position}><title>{escape(tooltip)}</title></circle>'


def diamond(css_class: str, x: float, y: float, radius: float, tooltip: str) -> str:
    """Return a diamond with a tooltip."""
    corners = f"M{x:.1f},{y - radius:.1f}l{radius},{radius}l{-radius},{radius}l{-radius},{-radius}z"
    return f'<path class="{css_class}" d="{corners}"><title>{escape(tooltip)}</title></path>'


def group(x: float, y: float, elements: Sequence[str]) -> str:
    """Return elements moved by x and y."""
    return f'<g transform="translate({x:.1f} {y:.1f})">{"".join(elements)}</g>'


def svg(width: float, height: float, label: str, elements: Sequence[str]) -> str:
    """Return an image that scales to the width of its container; screen readers read the `label`."""
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{"".join(elements)}</svg>'


def standalone_svg(image: str) -> str:
    """Return an inline image as the content of a file, with the page's style and background."""
    background = '<rect width="100%" height="100%" fill="var(--page)"/>'
    head, body = image.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STYLESHEET.read_text()}</style>{background}{body}'


def linear_scale(low: float, high: float, start: float, end: float) -> Scale:
    """Return a linear scale that maps `low` to `start` and `high` to `end`."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def log_scale(low: float, high: float, start: float, end: float) -> Scale:
    """Return a logarithmic scale that maps `low` to `start` and `high` to `end`."""
    log_low = math.log(max(low, MIN_LOG_VALUE))
    span = max(MIN_LOG_VALUE, math.log(max(high, MIN_LOG_VALUE)) - log_low)
    return lambda value: start + (math.log(max(value, MIN_LOG_VALUE)) - log_low) / span * (end - start)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers between two values."""
    rough = max((high - low) / count, 1e-12)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two values for a logarithmic scale."""
    low = max(low, MIN_LOG_VALUE)
    if high < 4 * low:
        return linear_ticks(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 3, 5) if high < 12 * low else (1, 2, 5) if high < 1000 * low else (1,)
    return [tick for power in powers for factor in factors if low <= (tick := factor * 10.0**power) <= high]
