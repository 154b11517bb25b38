"""Load and validate token windows, from the files that jobs/evaluate.py also reads, and models."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

WINDOWS_FORMAT = '{"context": N, "continuation": M, "windows": [{"name": ..., "ids": [N + M token ids]}]}'


class UserError(ValueError):
    """An error of the user, with a message of one sentence for them; baklava's own class is not available here."""


def run_cli(run: Callable[[], object]) -> int:
    """Run a command and return its exit code: 2 with one sentence for a UserError, otherwise 0."""
    try:
        run()
    except UserError as error:
        print(f"kvpress: {error}", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class Window:
    """Token ids of a text: `ids[:context]` are prefilled under a press, and the rest is scored."""

    name: str
    document: str | None
    ids: tuple[int, ...]
    context: int

    @property
    def continuation(self) -> int:
        """Number of scored tokens."""
        return len(self.ids) - self.context


def read_windows(path: Path) -> list[Window]:
    """Return the windows of a file, which have equal lengths and unique names.

    Raises:
        UserError: the file is not valid, a window has another length, a name occurs twice, or there are no windows.
    """
    try:
        content = json.loads(path.read_text())
        context, continuation = _positive_length(content["context"]), _positive_length(content["continuation"])
        windows = [_parse_window(entry, context) for entry in content["windows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read windows from {path} ({type(error).__name__}: {error}); the format is {WINDOWS_FORMAT}"
        ) from None
    for window in windows:
        if len(window.ids) != context + continuation:
            raise UserError(
                f"window {window.name} in {path} has {len(window.ids)} ids, not {context + continuation}; cut it again"
            )
    if len({window.name for window in windows}) < len(windows):
        raise UserError(f"{path} gives two windows the same name, but scores are stored by name; rename one")
    if not windows:
        raise UserError(f"{path} has no windows; add at least one")
    return windows


def validate_windows(windows: list[Window], config: Any) -> None:
    """Raise UserError if a model of this configuration cannot read a window."""
    for window in windows:
        if not all(0 <= token < config.vocab_size for token in window.ids):
            raise UserError(f"window {window.name} has ids outside 0 to {config.vocab_size - 1}; use this model's ids")
        if len(window.ids) > config.max_position_embeddings:
            raise UserError(
                f"window {window.name} has {len(window.ids)} tokens, the model {config.max_position_embeddings} "
                "positions; cut shorter windows"
            )


def _positive_length(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"a length of {value!r} tokens")
    return value


def _parse_window(entry: dict[str, Any], context: int) -> Window:
    if not isinstance(entry["name"], str) or not all(type(token) is int for token in entry["ids"]):
        raise ValueError("a name is not a string, or an id is not a whole number")
    return Window(entry["name"], entry.get("document"), tuple(entry["ids"]), context)


MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that kvpress supports and whose layers all have the same kind of attention."""


def load(directory: Path) -> Any:
    """Return the model, with SDPA attention.

    Raises:
        UserError: the folder has no model in safetensors, or the model cannot be scored here.
    """
    import torch  # imported here, since offline mode must be set before
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    if not (directory / "config.json").is_file() or not list(directory.glob("*.safetensors")):
        raise UserError(
            f"--model {directory} is not a folder with a config.json and safetensors; give such a folder, or run "
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
    """Raise UserError if kvpress or the masks of this comparison would treat a model wrongly."""
    if config.model_type not in MODEL_TYPES:
        raise UserError(f"a model of type {config.model_type!r} is not supported; use one of {', '.join(MODEL_TYPES)}")
    if getattr(config, "sliding_window", None):
        raise UserError(
            f"the model's layers see {config.sliding_window} tokens, but presses and masks here are for layers that "
            "see all; give a model without sliding windows"
        )


def digest(directory: Path, window: Window) -> str:
    """Return a digest of what a score depends on: the model's files (size and time), the window and the libraries."""
    files = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in sorted(directory.iterdir())]
    content = json.dumps([files, window.ids, window.context, versions()])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of the libraries that the scores depend on."""
    return {name: metadata.version(name) for name in ("kvpress", "transformers", "torch")}
