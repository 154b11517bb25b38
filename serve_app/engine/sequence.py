"""A request inside the engine, and the sequences that are generated for it."""

import threading
import time
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.plan.budget_plan import BudgetPlan
from serve_app.engine.sampler import SampledToken, SamplingState, sample_tokens
from serve_app.engine.types import EngineOutput, EngineRequest, FinishReason, Logprob, OutputCallback, TokenOutput


class Request:
    """A submitted request, equal to itself only.

    Args:
        params: what the client wants.
        plan: the plan that was active when the request was submitted.
        callback: receives the outputs.
        is_internal: the engine's own request, which fills the prefix cache and is not counted.
    """

    def __init__(
        self, params: EngineRequest, plan: BudgetPlan, callback: OutputCallback, is_internal: bool = False
    ) -> None:
        self.params, self.plan, self.is_internal = params, plan, is_internal
        self.has_ended = False  # set by the scheduler
        self._callback = callback
        self._cancelled = threading.Event()
        self._stopped: set[int] = set()

    @property
    def max_tokens(self) -> int:
        """Maximum length of a sequence, its prompt included."""
        return len(self.params.prompt) + self.params.sampling_params.max_tokens

    def cancel(self) -> None:
        """End the request within one step; may be called from any thread."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether the client went away."""
        return self._cancelled.is_set()

    def stop_sequence(self, index: int) -> None:
        """End one sequence within one step; may be called from any thread."""
        self._stopped.add(index)

    def is_stopped(self, index: int) -> bool:
        """Whether a sequence has all the text that it needs."""
        return index in self._stopped

    @property
    def is_expired(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() > self.params.deadline

    def emit(self, output: EngineOutput) -> None:
        """Deliver an output, unless the client went away."""
        if not self.is_cancelled:
            self._callback(output)


@dataclass(eq=False)
class Sequence:
    """One of a request's sequences; `last_token` is the newest one, which is not in the cache yet."""

    request: Request
    index: int
    cache: BudgetedCache
    sampling: SamplingState
    end_ids: frozenset[int]
    num_generated: int = 0
    last_token: int = -1
    finish_reason: FinishReason | None = None

    def append(self, token: SampledToken) -> TokenOutput:
        """Continue with a sampled token, which may finish the sequence."""
        self.sampling.append(token.id)
        self.last_token = token.id
        self.num_generated += 1
        if self.last_token in self.end_ids:
            self.finish_reason = "stop"
        elif self.num_generated >= self.request.params.sampling_params.max_tokens:
            self.finish_reason = "length"
        scored = token.logprob
        logprob = None if scored is None else Logprob(scored.id, scored.logprob, scored.top)
        return TokenOutput(self.last_token, self.index, self.finish_reason, logprob)


def sample_batch(logits: Float[Tensor, "rows vocabulary"], batch: Sequences[Sequence]) -> list[TokenOutput | Exception]:
    """Sample the next token of each sequence from its row and append it; an exception for one that this fails for."""
    sampled = sample_tokens(logits, [sequence.sampling for sequence in batch])
    return [
        token if isinstance(token, Exception) else sequence.append(token)
        for sequence, token in zip(batch, sampled, strict=True)
    ]
