"""What is being done and how long it will still take, on a terminal and in a log file alike."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from baklava.errors import UserError

LOG_INTERVAL_SECONDS = 10.0  # seconds after which a log gets a line even without a tenth of the way done


@runtime_checkable
class ProgressBar(Protocol):
    """A count of steps under way, closed by leaving its `with` block."""

    def __enter__(self) -> "ProgressBar": ...
    def __exit__(self, *error: object) -> None: ...

    def update(self, n: float = 1) -> object:
        """Count `n` more steps."""

    def set_postfix_str(self, s: str) -> None:
        """Show `s` behind the count, such as the best value so far."""


def log(message: str) -> None:
    """Print one line for the person who waits; stdout stays free for results."""
    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


def progress_bar(total: int, label: str, unit: str = "steps") -> ProgressBar:
    """Count to `total` steps: a live bar on a terminal, else a line every tenth of the way or every ten seconds."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=label, unit=unit, dynamic_ncols=True)
    return LogProgress(total, label, unit)


class LogProgress:
    """The count as plain lines, since a log file keeps every redraw of a live bar."""

    def __init__(self, total: int, label: str, unit: str) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done, self.note = 0.0, ""
        self.started = self.said_at = time.monotonic()
        self.said = 0.0

    def __enter__(self) -> "LogProgress":
        return self

    def __exit__(self, *error: object) -> None:
        if self.done != self.said:
            self._say()

    def update(self, n: float = 1) -> None:
        """Count `n` more steps, and print a line when one is due."""
        self.done += n
        waited = time.monotonic() - self.said_at
        if self.done >= self.total or self.done - self.said >= self.total / 10 or waited >= LOG_INTERVAL_SECONDS:
            self._say()

    def set_postfix_str(self, s: str) -> None:
        """Show `s` at the end of the next line."""
        self.note = s

    def _say(self) -> None:
        self.said, self.said_at = self.done, time.monotonic()
        spent = self.said_at - self.started
        left = spent / self.done * max(0, self.total - self.done) if self.done else 0
        line = f"{self.label} {self.done:g}/{self.total} {self.unit}, {_clock(spent)} spent, {_clock(left)} left"
        log(f"{line}, {self.note}" if self.note else line)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def run_cli(name: str, run: Callable[[], object]) -> int:
    """Run a script that reports to nobody; 0, 2 and one sentence where the user gave something wrong, 130 at Ctrl-C."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the hub's library is first imported
    try:
        run()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


OPTIONS = {"plans": "plan", "speed": "no-speed"}
"""Options by the name of the setting that they fill, where the two differ."""


def positive_int(text: str) -> int:
    """A number that is at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number that is at least 1")
    return int(text)


def replica_count(text: str) -> int | str:
    """`auto`, or a number of replicas."""
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither auto nor a number of replicas")
    return text if text == "auto" else int(text)


def reject_settings_on_resume(earlier: Path, given: Mapping[str, Any], out: Path | None) -> None:
    """Raise UserError when settings are given for something that has its own."""
    if given or out:
        first = next(iter([*given, "out"]))
        option = OPTIONS.get(first, first.replace("_", "-"))
        raise UserError(f"--resume takes its settings from {earlier}; leave out --{option}")
