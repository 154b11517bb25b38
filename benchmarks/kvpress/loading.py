"""Token windows from a file, checked: the same file that jobs/evaluate.py reads."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
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


def validate_for(windows: list[Window], config: Any) -> None:
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


KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that kvpress knows and whose layers all attend alike."""


def load(directory: Path) -> Any:
    """The model with sdpa attention.

    Raises:
        UserError: no folder of a model in safetensors, or of a kind that cannot be scored here.
    """
    import torch  # these here, since offline mode is set before they are read
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    if not (directory / "config.json").is_file() or not list(directory.glob("*.safetensors")):
        raise UserError(
            f"--model {directory} is no folder with a config.json and safetensors; give such a folder, or run "
            "`make peers`, which finds the demo model's"
        )
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    check_scorable(config)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="sdpa",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    return model.eval()


def check_scorable(config: Any) -> None:
    """Raise UserError for a model that kvpress or the masks of this comparison would treat wrongly."""
    if config.model_type not in KINDS:
        raise UserError(f"a model of type {config.model_type!r} is not compared here; give one of {', '.join(KINDS)}")
    if getattr(config, "sliding_window", None):
        raise UserError(
            f"the model's layers see {config.sliding_window} tokens, but presses and masks here are for layers that "
            "see all; give a model without sliding windows"
        )


def digest(directory: Path, window: Window) -> str:
    """What a score depends on: the model's files (by size and time), the window's ids, and the libraries."""
    files = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in sorted(directory.iterdir())]
    content = json.dumps([files, window.ids, window.context, versions()])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of the libraries that decide on the scores."""
    return {name: metadata.version(name) for name in ("kvpress", "transformers", "torch")}
