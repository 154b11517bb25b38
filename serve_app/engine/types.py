"""What the engine is asked for and what it answers: frozen records that pass between the HTTP side and its thread."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from serve_app.engine.sampler import Sampling

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class EngineRequest:
    """One request: `n` continuations of a prompt, each drawn with the sampling's seed plus its index.

    `logprobs` asks for log-probabilities of generated tokens, each with so many alternatives; `prompt_logprobs` for
    those of the prompt, which then enters token by token as if it were decoded, so that the budget holds for every one
    of them. `deadline` is the time.monotonic() by which the request must have ended, its wait included.
    """

    prompt: tuple[int, ...]
    sampling_params: Sampling
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    deadline: float = float("inf")


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability in nats before temperature and truncation, and the likeliest tokens in its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PrefillDone:
    """The prompt is in the cache; `cached_tokens` of it came from a snapshot.

    `prompt_logprobs` has one entry per prompt token, None for the first; empty where none were asked for. `finish` is
    set where no token was to be generated. `admitted` is the time.monotonic() at which it left the queue,
    `plan` the digest of the plan that it lives inside.
    """

    cached_tokens: int = 0
    prompt_logprobs: tuple[Logprob | None, ...] = ()
    finish_reason: FinishReason | None = None
    admitted_at: float = field(default_factory=time.monotonic)
    plan_digest: str = ""


@dataclass(frozen=True)
class TokenOutput:
    """A token of the continuation `index`, and why that one ends with it, if it does."""

    token_id: int
    index: int = 0
    finish_reason: FinishReason | None = None
    logprob: Logprob | None = None


class RequestRejected(Exception):  # noqa: N818  # its kinds are errors
    """Why the engine does not begin or go on with a request; nothing else is harmed by it."""


class QueueFullError(RequestRejected):
    """As many requests wait as may; `retry_after` is in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("The server is busy and its queue is full; try again later.")
        self.retry_after = retry_after


class DrainingError(RequestRejected):
    """The server takes no more requests, because it is about to end."""

    def __init__(self, message: str = "The server is shutting down; ask another one.") -> None:
        super().__init__(message)


class TooLargeError(RequestRejected):
    """The request alone needs more bytes than the pool has."""


class DeadlineError(RequestRejected):
    """The request's time is up; `waiting` tells whether it was still in the queue."""

    def __init__(self, waiting: bool) -> None:
        super().__init__("The request's time was up.")
        self.waiting = waiting


EngineOutput = PrefillDone | TokenOutput | Exception
"""Of every request: Started, then tokens until each continuation had its finish; or an exception, which ends it."""

OutputCallback = Callable[[EngineOutput], None]
"""Called on the engine's thread; must return at once."""


class RequestHandle(Protocol):
    """A request that the engine has taken in. Both may be called from any thread, and more than once."""

    def cancel(self) -> None:
        """Nobody wants it any more: it ends within one step, and is told nothing more."""

    def stop_sequence(self, index: int) -> None:
        """One continuation has all the text that it needs: it ends within one step, and the others go on."""


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done so far; every number only grows."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    rejected: int = 0
    steps: int = 0


@dataclass(frozen=True)
class EngineState:
    """What an engine is doing now. Bytes are of KV caches; `promised` are reserved, `held` measured, `most` ever held.

    `seen` and `kept` are entries of all running sequences over all (layer, KV head), without and with eviction.
    """

    running: int
    waiting: int
    pool_bytes: int
    reserved_bytes: int
    allocated_bytes: int
    peak_bytes: int
    snapshot_bytes: int
    seen: int
    kept: int
    draining: bool
    alive: bool
    plan: str
    counts: EngineStats = EngineStats()
