"""What the scripts' command lines have in common."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baklava.errors import UserError

OPTIONS = {"plans": "plan", "speed": "no-speed"}
"""Options by the name of the setting that they fill, where the two differ."""


def count(text: str) -> int:
    """A number that is at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number that is at least 1")
    return int(text)


def replicas(text: str) -> int | str:
    """`auto`, or a number of replicas."""
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither auto nor a number of replicas")
    return text if text == "auto" else int(text)


def check_resumed(earlier: Path, given: Mapping[str, Any], out: Path | None) -> None:
    """Raise UserError when settings are given for something that has its own."""
    if given or out:
        first = next(iter([*given, "out"]))
        option = OPTIONS.get(first, first.replace("_", "-"))
        raise UserError(f"--resume takes its settings from {earlier}; leave out --{option}")
