"""A request inside the engine, and its continuations, each with a cache and a sampler of its own."""

import threading
import time
from dataclasses import dataclass

from torch import Tensor

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.logprobs import TokenLogprob, token_logprobs
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import Logits
from serve_app.engine.sampler import Sampler
from serve_app.engine.types import OutputCallback, EngineOutput, FinishReason, Logprob, TokenOutput, EngineRequest


class Request:
    """A request on its way, equal to itself only; `internal` ones are the engine's own.

    `plan` was in force when it was taken in.
    """

    def __init__(self, work: EngineRequest, plan: BudgetPlan, deliver: OutputCallback, internal: bool = False) -> None:
        self.work, self.plan, self._deliver, self.internal = work, plan, deliver, internal
        self._gone = threading.Event()
        self.completed: set[int] = set()  # continuations that have all the text that they need

    @property
    def tokens(self) -> int:
        """Most tokens that a continuation will have, its prompt included."""
        return len(self.work.prompt) + self.work.sampling_params.max_tokens

    def cancel(self) -> None:
        """Say that nobody wants it any more; may be called from any thread."""
        self._gone.set()

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants it any more."""
        return self._gone.is_set()

    def stop_sequence(self, index: int) -> None:
        """Say that a continuation has all the text that it needs; may be called from any thread."""
        self.completed.add(index)

    @property
    def late(self) -> bool:
        """Whether its time is up."""
        return time.monotonic() > self.work.deadline

    def tell(self, event: EngineOutput) -> None:
        """Deliver an event; who has cancelled hears nothing more."""
        if not self.cancelled:
            self._deliver(event)

    def continuations(self, loaded: LoadedModel, cache: BudgetedCache) -> list["Continuation"]:
        """All of its continuations behind one prompt: the first goes on in this cache, the others in copies."""
        caches = [cache, *(cache.copy(self.tokens) for _ in range(self.work.n - 1))]
        sampling = self.work.sampling_params
        ends = sampling.stop_ids if sampling.ignore_eos else sampling.stop_ids | loaded.eos_token_ids
        return [
            Continuation(self, index, own, Sampler(sampling, self.work.prompt, ends, loaded.device, index), ends)
            for index, own in enumerate(caches)
        ]


@dataclass(eq=False)
class Continuation:
    """One continuation: `last` is its newest token, which has not been fed yet."""

    request: Request
    index: int
    cache: BudgetedCache
    sampler: Sampler
    ends: frozenset[int]
    made: int = 0
    last: int = -1
    finish: FinishReason | None = None

    @property
    def complete(self) -> bool:
        """Whether it has all the text that it needs, such as up to a stop string."""
        return self.index in self.request.completed

    def go_on(self, logits: Tensor, likeliest: int) -> TokenOutput:
        """Choose the next token from its logits [vocabulary], of which the likeliest is known."""
        if self.sampler.plain:
            self.last = likeliest
            self.sampler.took(likeliest)
        else:
            self.last = self.sampler.draw(logits)
        self.made += 1
        if self.last in self.ends:
            self.finish = "stop"
        elif self.made >= self.request.work.sampling_params.max_tokens:
            self.finish = "length"
        return TokenOutput(self.last, self.index, self.finish, self._logprob(logits))

    def _logprob(self, logits: Tensor) -> Logprob | None:
        wanted = self.request.work.logprobs
        return None if wanted is None else as_logprob(token_logprobs(logits[None], [self.last], wanted)[0])


def as_logprob(found: TokenLogprob) -> Logprob:
    """The record that leaves the engine."""
    return Logprob(found.id, found.logprob, found.top)


def begin(continuations: list[Continuation], logits: Logits) -> list[TokenOutput]:
    """The first token of each continuation behind the same prompt."""
    likeliest = int(logits[0].argmax())
    return [each.go_on(logits[0], likeliest) for each in continuations]
