"""The command line: log lines, progress, exit codes, and argument types that commands share."""

import argparse
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from baklava.errors import UserError

LOG_INTERVAL_SECONDS = 10.0
"""Seconds after which a log gets a line even if less than a tenth of the work was done."""

OPTION_OF_SETTING = {"plans": "plan", "speed": "no-speed"}
"""Options whose names differ from those of the settings that they fill."""


def log(message: str) -> None:
    """Print a line to stderr, without breaking a progress bar; stdout is for results.

    If stderr takes none, since its terminal has closed or its disk is full, the work goes on without the line.
    """
    with suppress(OSError):
        tqdm.write(message, file=sys.stderr)
        sys.stderr.flush()


@runtime_checkable
class ProgressBar(Protocol):
    """A count of steps; leaving its `with` block closes it."""

    def __enter__(self) -> "ProgressBar": ...
    def __exit__(self, *error: object) -> None: ...

    def update(self, n: float = 1) -> object:
        """Count `n` more steps."""

    def set_postfix_str(self, s: str) -> None:
        """Show `s` after the count, such as the best value so far."""


def progress_bar(total: int, label: str, unit: str = "steps") -> ProgressBar:
    """Return a live bar on a terminal; otherwise one that logs a line every tenth of the work or every ten seconds."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=label, unit=unit, dynamic_ncols=True)
    return LogProgress(total, label, unit)


class LogProgress:
    """Progress as plain lines, since a log file would record every redraw of a live bar."""

    def __init__(self, total: int, label: str, unit: str) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done = self.logged = 0.0
        self.note = ""
        self.started = self.logged_at = time.monotonic()

    def __enter__(self) -> "LogProgress":
        return self

    def __exit__(self, *error: object) -> None:
        if self.done != self.logged:
            self._log()

    def update(self, n: float = 1) -> None:
        """Count `n` more steps, and log a line if one is due."""
        self.done += n
        is_tenth = self.done >= self.total or self.done - self.logged >= self.total / 10
        if is_tenth or time.monotonic() - self.logged_at >= LOG_INTERVAL_SECONDS:
            self._log()

    def set_postfix_str(self, s: str) -> None:
        """Show `s` at the end of the next line."""
        self.note = s

    def _log(self) -> None:
        self.logged, self.logged_at = self.done, time.monotonic()
        spent = self.logged_at - self.started
        left = spent / self.done * max(0, self.total - self.done) if self.done else 0
        line = f"{self.label} {self.done:g}/{self.total} {self.unit}, {_clock(spent)} spent, {_clock(left)} left"
        log(f"{line}, {self.note}" if self.note else line)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


EXTRAS = {
    "baklava-search": "search",
    "baklava-evaluate": "eval",
    "baklava-serve": "serve",
    "baklava-benchmark": "bench",
}
"""The extra of the package that each command needs."""


OWN_PACKAGES = ("baklava", "tuning", "serve_app", "benchmarks")


def shell_command(name: str) -> str:
    """Return how a shell in this folder runs one of our commands: by its name if the PATH leads to this environment."""
    script, found = Path(sys.executable).parent / name, shutil.which(name)
    if not script.exists() or (found and Path(found).absolute() == script):
        return name
    with suppress(OSError, ValueError):  # the folder is gone, or the script is elsewhere
        return shlex.quote(str(script.relative_to(Path.cwd())))
    return shlex.quote(str(script))


def run_cli(name: str, run: Callable[[], object]) -> int:
    """Run a command and return its exit code: 2 with one sentence for a UserError, 130 at Ctrl-C, otherwise 0.

    A missing package counts as a UserError for the commands in `EXTRAS`.
    Telemetry of the Hugging Face hub is off unless the user has switched it on.
    SIGTERM and the end of the terminal do what Ctrl-C does.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the hub's library is first imported
    try:
        with _ends_as_interrupts():
            run()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if name not in EXTRAS or (error.name or "").partition(".")[0] in OWN_PACKAGES:
            raise
        print(
            f"{name}: needs {error.name}, which is not installed: pip install 'baklava[{EXTRAS[name]}]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


@contextmanager
def _ends_as_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGTERM and SIGHUP inside the block, so that what runs can end in order.

    A signal that is ignored, as `nohup` does with SIGHUP, stays ignored.
    """
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) is signal.SIG_DFL
    }
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def positive_int(text: str) -> int:
    """Parse an argument that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def positive_float(text: str) -> float:
    """Parse an argument that is a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


PREFILL_CHUNK_HELP = (
    "prefill prompts in chunks of this many tokens, each compressed before the next one: no full cache is ever held, "
    "and a little is lost (default: whole prompts, or as the plan says)"
)


def share(text: str) -> float:
    """Parse an argument that is a share, as a number such as 0.25 or as 25%; its range is for the caller to check."""
    number, percent, rest = text.strip().partition("%")
    try:
        value = math.nan if rest else float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a share; give a number such as 0.25, or 25%")
    return value / 100 if percent else value


def port(text: str) -> int:
    """Parse an argument that is a TCP port."""
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text} is not a port; give a number from 1 to 65535")
    return int(text)


def replica_count(text: str) -> int | str:
    """Parse an argument that is `auto` or a number of replicas."""
    if text == "auto":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number of replicas; give a number, or auto")
    return int(text)


def reject_settings_on_resume(earlier: Path, settings: Mapping[str, Any], out: Path | None) -> None:
    """Raise UserError if options are given in addition to `--resume`, since a resumed run has its own settings."""
    if settings or out:
        first = next(iter([*settings, "out"]))
        option = OPTION_OF_SETTING.get(first, first.replace("_", "-"))
        raise UserError(f"--resume takes its settings from {earlier}; leave out --{option}")
