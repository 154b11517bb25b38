"""HTML pages from templates: one file that loads nothing and runs no script, in the theme of its reader."""

from collections.abc import Mapping
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
