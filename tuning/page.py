"""Pages: one HTML file that needs nothing else, neither a network nor a script, in the light and dark of its reader."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template

from baklava.files import write_whole

HERE = Path(__file__).parent


def write_page(path: Path, template: str, fields: Mapping[str, str]) -> None:
    """Write a page whose content is a template beside this file; `fields`, "title" and "lead" too, are HTML already."""
    style, content = (HERE / "style.css").read_text(), filled(template, fields)
    write_whole(path, filled("page.html", {**fields, "style": style, "kind": Path(template).stem, "content": content}))


def filled(template: str, fields: Mapping[str, str]) -> str:
    """A template beside this file with its fields filled in; a field that is missing is an error."""
    return Template((HERE / template).read_text()).substitute(fields)


def figures(values: Mapping[str, str]) -> str:
    """Large figures with small names."""
    return "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in values.items())


def pairs(values: Mapping[str, object]) -> str:
    """Names and values, for a <dl>."""
    shown = {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(value)}</dd>" for name, value in shown.items()
    )


def steps(commands: Mapping[str, str]) -> str:
    """What to do next, and the command for it, for a <dl>."""
    return "".join(
        f"<dt>{escape(what)}</dt><dd><code>{escape(command)}</code></dd>" for what, command in commands.items()
    )
