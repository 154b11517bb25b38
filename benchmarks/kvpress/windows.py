"""Token windows from a file, checked: the same file that jobs/evaluate.py reads."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAYOUT = '{"context": N, "continuation": M, "windows": [{"name": ..., "ids": [N + M token ids]}]}'


class UserError(ValueError):
    """Something that the user gave is wrong; the message is one sentence for them. baklava's own is not at hand."""


def exit_code(run: Callable[[], object]) -> int:
    """Run a script; 0, or 2 and one sentence where the user gave something wrong."""
    try:
        run()
    except UserError as error:
        print(f"kvpress: {error}", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class Window:
    """`ids[:context]` are prefilled under a press, the rest is scored. `document` is what the file says, or None."""

    name: str
    document: str | None
    ids: tuple[int, ...]
    context: int

    @property
    def continuation(self) -> int:
        """Tokens scored."""
        return len(self.ids) - self.context


def read_windows(path: Path) -> list[Window]:
    """All windows of a file, of equal lengths and with names of their own.

    Raises:
        UserError: not such a file, a window of another length, a name twice, or no window at all.
    """
    try:
        content = json.loads(path.read_text())
        context, continuation = _length(content["context"]), _length(content["continuation"])
        cut = [_window(each, context) for each in content["windows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read windows from {path} ({type(error).__name__}: {error}); the file holds {LAYOUT}"
        ) from None
    for window in cut:
        if len(window.ids) != context + continuation:
            raise UserError(
                f"window {window.name} in {path} has {len(window.ids)} ids, not {context + continuation}; cut it again"
            )
    if len({window.name for window in cut}) < len(cut):
        raise UserError(f"{path} gives two windows the same name, but scores are kept by name; name them apart")
    if not cut:
        raise UserError(f"{path} holds no windows; give at least one")
    return cut


def check_fits(windows: list[Window], config: Any) -> None:
    """Raise UserError for windows that a model of this configuration cannot read."""
    for window in windows:
        if not all(0 <= token < config.vocab_size for token in window.ids):
            raise UserError(f"window {window.name} has ids outside 0 to {config.vocab_size - 1}; use this model's ids")
        if len(window.ids) > config.max_position_embeddings:
            raise UserError(
                f"window {window.name} has {len(window.ids)} tokens, the model {config.max_position_embeddings} "
                "positions; cut shorter windows"
            )


def _length(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"a length of {value!r} tokens")
    return value


def _window(entry: dict[str, Any], context: int) -> Window:
    if not isinstance(entry["name"], str) or not all(type(token) is int for token in entry["ids"]):
        raise ValueError("a name that is no string, or an id that is no whole number")
    return Window(entry["name"], entry.get("document"), tuple(entry["ids"]), context)
