"""The engine's requests and outputs: frozen records that pass between the HTTP side and the engine's thread."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from serve_app.engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class EngineRequest:
    """A prompt and how to continue it.

    Args:
        prompt: token ids.
        sampling_params: how tokens are sampled; sequence `index` uses the seed plus its index.
        n: number of sequences generated from the prompt.
        logprobs: number of alternatives to return with the log-probability of each generated token.
        prompt_logprobs: the same for prompt tokens. The prompt is then prefilled token by token as if it were decoded,
            so the budget applies to every token.
        deadline: time.monotonic() by which the request must have ended, its time in the queue included.
        cache_salt: only prompts of the same salt share caches, so that the time to an answer tells nothing of others.
    """

    prompt: tuple[int, ...]
    sampling_params: SamplingParams
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    deadline: float = float("inf")
    cache_salt: str = ""


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability in nats before temperature and truncation, and the most likely alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PrefillDone:
    """The prompt is in the cache.

    Args:
        cached_tokens: prompt tokens that came from the prefix cache.
        prompt_logprobs: one per prompt token, None for the first; empty if none were requested.
        finish_reason: set if no token was to be generated.
        admitted_at: time.monotonic() at which the request left the queue.
        plan_digest: the plan that bounds the request's caches.
    """

    cached_tokens: int = 0
    prompt_logprobs: tuple[Logprob | None, ...] = ()
    finish_reason: FinishReason | None = None
    admitted_at: float = field(default_factory=time.monotonic)
    plan_digest: str = ""


@dataclass(frozen=True)
class TokenOutput:
    """A generated token of sequence `index`, with the reason if the sequence finishes with it."""

    token_id: int
    index: int = 0
    finish_reason: FinishReason | None = None
    logprob: Logprob | None = None


class RequestRejected(Exception):  # noqa: N818  # its subclasses are errors
    """Why the engine does not start or continue a request; no other request is affected."""


class QueueFullError(RequestRejected):
    """The queue is full; `retry_after` is in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("The server is busy and its queue is full; try again later.")
        self.retry_after = retry_after


class DrainingError(RequestRejected):
    """The server takes no new requests because it is shutting down."""

    def __init__(self, message: str = "The server is shutting down; send the request to another server.") -> None:
        super().__init__(message)


class TooLargeError(RequestRejected):
    """The request needs more bytes than the pool has."""


class DeadlineError(RequestRejected):
    """The request passed its deadline, in the queue if `was_waiting`, otherwise while it ran."""

    def __init__(self, was_waiting: bool) -> None:
        super().__init__("The request's time was up.")
        self.was_waiting = was_waiting


EngineOutput = PrefillDone | TokenOutput | Exception
"""A request's outputs in order: PrefillDone, then tokens until every sequence finishes; an exception ends it early."""

OutputCallback = Callable[[EngineOutput], None]
"""Called on the engine's thread, without its lock; must return at once. If it raises, its request fails."""


class RequestHandle(Protocol):
    """A submitted request. Both methods may be called from any thread, and more than once."""

    def cancel(self) -> None:
        """End the request within one step, without further outputs."""

    def stop_sequence(self, index: int) -> None:
        """End one sequence within one step, for example at a stop string; the others go on."""


@dataclass
class EngineStats:
    """Totals since the engine started."""

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
    """A snapshot of what the engine is doing.

    Args:
        running: sequences that decode, plus the request being prefilled.
        waiting: requests in the queue.
        reserved_bytes: bytes set aside at admission for the KV caches of requests, and for pinned prefixes.
        allocated_bytes: bytes that KV caches really allocate.
        peak_bytes: most bytes that were ever allocated, at any moment of any step.
        prefix_cache_bytes: bytes of pinned prefixes, part of `allocated_bytes`.
        cached_prompt_bytes: bytes of the caches of earlier prompts, part of `allocated_bytes` but not of
            `reserved_bytes`: they make way for requests.
        full_entries: KV entries of all running sequences over all (layer, KV head) if nothing had been evicted.
        cached_entries: KV entries that they have.
        plan: digest of the active plan.
    """

    running: int
    waiting: int
    pool_bytes: int
    reserved_bytes: int
    allocated_bytes: int
    peak_bytes: int
    prefix_cache_bytes: int
    cached_prompt_bytes: int
    full_entries: int
    cached_entries: int
    draining: bool
    alive: bool
    plan: str
    counts: EngineStats = field(default_factory=EngineStats)
