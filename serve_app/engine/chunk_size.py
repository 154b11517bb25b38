"""How many prompt tokens a step prefills, and how long a new request has to wait."""

import math
import time

DEFAULT_PREFILL_DECODE_RATIO = 1.3
"""Default ratio of prefill time to decode time within one step. Running sequences wait this much longer."""

MIN_PREFILL_CHUNK_TOKENS = 16
"""A smaller chunk takes as long: the model's weights are read for one token as for many."""

LARGE_CHUNK_TOKENS = 256
"""From this size on, reading the weights is a small part of a chunk's time."""

IDLE_PREFILL_CHUNK_TOKENS = 512
"""Chunk while nothing decodes; a request that arrives waits for one such chunk at most."""

MAX_RETRY_AFTER_SECONDS = 120
"""Clients that are asked to wait longer do not return."""


class MovingAverage:
    """An exponential moving average."""

    def __init__(self, weight: float = 0.3) -> None:
        self._weight, self.value = weight, 0.0

    def add(self, value: float) -> None:
        """Add a value; the first one is the average."""
        self.value = value if not self.value else (1 - self._weight) * self.value + self._weight * value


class ChunkSizePolicy:
    """Chooses the prefill chunk so that a step's prefill takes `prefill_decode_ratio` times as long as its decode.

    A chunk's time is that of reading the weights plus a time per token. Large chunks measure the time per token, small
    ones the time of the weights.
    """

    def __init__(self, max_chunk_tokens: int, prefill_decode_ratio: float = DEFAULT_PREFILL_DECODE_RATIO) -> None:
        self._max_chunk_tokens, self._ratio = max_chunk_tokens, prefill_decode_ratio
        self._decode_seconds, self._weights_seconds = MovingAverage(), MovingAverage()
        self._seconds_per_token = MovingAverage()
        self._seconds_between_finishes = MovingAverage()
        self._finished_at: float | None = None

    def observe_decode(self, seconds: float) -> None:
        """Record the duration of a decode batch."""
        self._decode_seconds.add(seconds)

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """Record the duration of a chunk; a step without a forward is not measured."""
        if not tokens:
            return
        if tokens >= LARGE_CHUNK_TOKENS or not self._seconds_per_token.value:
            self._seconds_per_token.add(seconds / tokens)
        else:
            self._weights_seconds.add(max(0.0, seconds - tokens * self._seconds_per_token.value))

    def chunk_tokens(self, decoding: bool) -> int:
        """Return the prompt tokens to prefill in the next step, which may also decode a batch."""
        if not decoding:
            return max(IDLE_PREFILL_CHUNK_TOKENS, self._max_chunk_tokens)
        if not self._seconds_per_token.value:
            return min(MIN_PREFILL_CHUNK_TOKENS, self._max_chunk_tokens)
        seconds = self._ratio * self._decode_seconds.value - self._weights_seconds.value
        tokens = int(seconds / self._seconds_per_token.value)
        return max(1, min(max(MIN_PREFILL_CHUNK_TOKENS, tokens), self._max_chunk_tokens))

    def on_finished(self) -> None:
        """Record that a request finished now."""
        now = time.monotonic()
        if self._finished_at is not None:
            self._seconds_between_finishes.add(min(now - self._finished_at, MAX_RETRY_AFTER_SECONDS))
        self._finished_at = now

    def estimate_wait_seconds(self, num_ahead: int) -> int:
        """Estimate when a request with `num_ahead` others before it is admitted, at the recent rate of finishes."""
        seconds = math.ceil((num_ahead + 1) * (self._seconds_between_finishes.value or 1))
        return min(max(1, seconds), MAX_RETRY_AFTER_SECONDS)
