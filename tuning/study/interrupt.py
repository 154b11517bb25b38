"""Ctrl-C: one press ends the search after the running trials, two end it now."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from baklava.errors import UserError

INTERRUPT_MESSAGE = b"stopping: running trials are finished and recorded, no new ones start; Ctrl-C again stops now\n"


@dataclass
class StopFlag:
    """Whether a search should start no more trials, and the error that it ends with, if there is one."""

    requested: bool = False
    error: UserError | None = None

    def raise_if_requested(self) -> None:
        """Raise the error of a stopped search, or KeyboardInterrupt if the user stopped it."""
        if self.requested:
            raise self.error or KeyboardInterrupt


@contextmanager
def graceful_interrupt(stop: StopFlag) -> Iterator[None]:
    """Inside the block, the first Ctrl-C sets the flag and the second raises KeyboardInterrupt as usual."""

    def request_stop(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, INTERRUPT_MESSAGE)  # print() is not reentrant

    # Outside the main thread, or if Ctrl-C is ignored or handled by others, leave it alone.
    installed = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        installed = installed and bool(signal.signal(signal.SIGINT, request_stop))
    except ValueError:
        installed = False
    try:
        yield
    finally:
        if installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
