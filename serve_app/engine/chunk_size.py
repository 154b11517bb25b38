"""How fast things go: how much of a prompt a step may take, and when there will be room for another request."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

BESIDE = 1.3
"""Time that a step's part of a prompt may take, in that of its decode batch, unless it is said: so long others wait."""

LEAST = 16
"""Fewest tokens of a prompt in a step: the model's weights are read for one as for many."""

LARGE = 256
"""Tokens of which the time for the model's weights is a small part."""

ALONE = 512
"""Tokens of a prompt in a step while nobody decodes; a request that comes waits for no more than that."""

LONGEST_WAIT = 120
"""Seconds; clients do not come back when told to wait for longer."""


class _Mean:
    """A mean that forgets, of what was added so far."""

    def __init__(self, weight: float = 0.3) -> None:
        self._weight, self.value = weight, 0.0

    def add(self, value: float) -> None:
        self.value = value if not self.value else (1 - self._weight) * self.value + self._weight * value


class Taken(Protocol):
    """A prompt on its way."""

    @property
    def taken(self) -> int:
        """Tokens of it so far."""


class Pace:
    """Measures steps, and says what they allow.

    A part of a prompt takes some time for the model's weights, and some for each token: large parts tell the one, and
    small ones then the other.
    """

    def __init__(self, most: int, beside: float = BESIDE) -> None:
        self._most, self._beside = most, beside
        self._decode, self._between = _Mean(), _Mean()
        self._token, self._weights = _Mean(), _Mean()
        self._ended: float | None = None

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Around a decode batch."""
        began = time.perf_counter()
        yield
        self._decode.add(time.perf_counter() - began)

    @contextmanager
    def entering(self, prompt: Taken) -> Iterator[None]:
        """Around a part of a prompt."""
        before, began = prompt.taken, time.perf_counter()
        yield
        if tokens := prompt.taken - before:
            self._took(tokens, time.perf_counter() - began)

    def _took(self, tokens: int, seconds: float) -> None:
        if tokens >= LARGE or not self._token.value:
            self._token.add(seconds / tokens)
        else:
            self._weights.add(max(0.0, seconds - tokens * self._token.value))

    def chunk(self, beside: bool) -> int:
        """Tokens of a prompt for the next step, which has a decode batch `beside` it or not."""
        if not beside:
            return max(ALONE, self._most)
        if not self._token.value:
            return min(LEAST, self._most)
        allowed = int((self._beside * self._decode.value - self._weights.value) / self._token.value)
        return max(1, min(max(LEAST, allowed), self._most))

    def ended(self) -> None:
        """A request has ended."""
        now = time.monotonic()
        if self._ended is not None:
            self._between.add(min(now - self._ended, LONGEST_WAIT))
        self._ended = now

    def wait(self, before: int) -> int:
        """Seconds until a request with so many before it may come in, as the last ones ended."""
        return min(max(1, math.ceil((before + 1) * (self._between.value or 1))), LONGEST_WAIT)
