"""Ctrl-C: one press ends the search after the trials under way, two end it now."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from baklava.errors import UserError

SAID = b"stopping: no new trials, those under way are finished and recorded; Ctrl-C again stops now\n"


@dataclass
class Stop:
    """Whether a search is to begin no more trials, and the error that it ends with, where it is for one."""

    asked: bool = False
    error: UserError | None = None

    def check(self) -> None:
        """Raise what the search ends with, if it was to stop."""
        if self.asked:
            raise self.error or KeyboardInterrupt


@contextmanager
def stoppable(stop: Stop) -> Iterator[None]:
    """Within it the first Ctrl-C only asks to stop, and the second is a KeyboardInterrupt as ever."""

    def ask(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, SAID)  # the interrupted code may be amid a print

    # Elsewhere than in the main thread, or where Ctrl-C is ignored or handled by others, it stays as it is.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        ours = ours and bool(signal.signal(signal.SIGINT, ask))
    except ValueError:
        ours = False
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
