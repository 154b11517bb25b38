"""How many prompt tokens a step prefills, and how long a new request has to wait."""

import math
import sys
import time

DEFAULT_MAX_BATCHED_TOKENS = 512
"""Default prompt tokens of a step that also decodes."""

DEFAULT_PREFILL_DECODE_RATIO = 1.3
"""Default ratio of prefill time to decode time within one step. Running sequences wait this much longer."""

MIN_PREFILL_CHUNK_TOKENS = 16
"""A prompt goes on at least at this pace."""

LARGE_CHUNK_TOKENS = 256
"""From this size on, a chunk's time is that of its tokens."""

SHARED_STEPS = 16
"""Steps that prompt tokens and a decode batch share until the batch is measured by itself again."""

PROBE_CHUNK_TOKENS = 64
"""Chunk of a step that also decodes if the time of a token is not known yet."""

IDLE_PREFILL_CHUNK_TOKENS = 512
"""Chunk while nothing decodes; a request that arrives waits for one such chunk at most."""

MAX_RETRY_AFTER_SECONDS = 120
"""Clients that are asked to wait longer do not return."""


class MovingAverage:
    """An exponential moving average."""

    def __init__(self, weight: float = 0.5) -> None:
        self._weight, self.value = weight, 0.0

    def add(self, value: float) -> None:
        """Add a value; the first one is the average."""
        self.value = value if not self.value else (1 - self._weight) * self.value + self._weight * value


class ChunkSizePolicy:
    """Chooses how many prompt tokens a step takes in addition to its decode batch.

    A step's time is that of its decode batch plus a time per prompt token. If they share a forward, only the sum is
    known. So a decode batch has its first step for itself, and one in a while; what the others take longer is the time
    of their tokens. Only what is short enters at once, so that many short prompts enter in as many steps.

    Args:
        max_batched_tokens: Prompt tokens of a step that also decodes.
        prefill_decode_ratio: Time that the prompt tokens of a step may take, as a multiple of its decode batch's.
        tpot_target: Seconds that a step which also decodes may take, instead of the ratio; None for none.
    """

    def __init__(
        self,
        max_batched_tokens: int,
        prefill_decode_ratio: float = DEFAULT_PREFILL_DECODE_RATIO,
        tpot_target: float | None = None,
    ) -> None:
        self._max_tokens, self._ratio, self._tpot_target = max_batched_tokens, prefill_decode_ratio, tpot_target
        self._decode_seconds, self._seconds_per_token = MovingAverage(), MovingAverage()
        self._batch_size = self._num_shared = 0  # of the batch that was measured, and forwards since
        self._seconds_between_finishes = MovingAverage()
        self._finished_at: float | None = None

    def observe_step(
        self, batch_size: int, prompt_tokens: int, seconds: float, prompt_seconds: float | None = None
    ) -> None:
        """Record the duration of a step with a decode batch or without.

        Args:
            batch_size: Sequences of the decode batch; 0 if there was none.
            prompt_tokens: Prompt tokens of the step.
            seconds: Its duration.
            prompt_seconds: Seconds of it that were for the prompt alone; None if both shared a forward.
        """
        if batch_size and prompt_tokens and prompt_seconds is None:
            self._num_shared += 1
            if batch_size == self._batch_size and prompt_tokens >= MIN_PREFILL_CHUNK_TOKENS:
                prompt_seconds = max(0.0, seconds - self._decode_seconds.value)
        elif batch_size:
            if batch_size != self._batch_size:
                self._batch_size, self._decode_seconds = batch_size, MovingAverage()
            self._num_shared = 0
            self._decode_seconds.add(seconds - (prompt_seconds or 0))
        elif prompt_tokens >= LARGE_CHUNK_TOKENS:  # of a smaller one, most is the time of the weights
            prompt_seconds = seconds
        if prompt_tokens and prompt_seconds is not None:
            self._seconds_per_token.add(prompt_seconds / prompt_tokens)

    def chunk_tokens(self, batch_size: int, tokens_left: int = sys.maxsize) -> int:
        """Return the prompt tokens of the next step; 0 if its decode batch is to be measured by itself.

        Args:
            batch_size: Sequences of the decode batch.
            tokens_left: Tokens of the prompt that have not been prefilled.
        """
        if not batch_size:
            return max(IDLE_PREFILL_CHUNK_TOKENS, self._max_tokens)
        decode_seconds = self._decode_seconds.value
        if self._num_shared >= SHARED_STEPS:
            return 0
        if batch_size != self._batch_size:
            is_short = 0 < tokens_left <= MIN_PREFILL_CHUNK_TOKENS
            return min(MIN_PREFILL_CHUNK_TOKENS, self._max_tokens) if is_short else 0
        if not self._seconds_per_token.value:
            return min(PROBE_CHUNK_TOKENS, self._max_tokens)
        seconds = self._ratio * decode_seconds if self._tpot_target is None else self._tpot_target - decode_seconds
        tokens = int(seconds / self._seconds_per_token.value)
        return max(1, min(max(MIN_PREFILL_CHUNK_TOKENS, tokens), self._max_tokens))

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
