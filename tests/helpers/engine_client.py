"""An engine's client in the same process: collects the outputs of a request and waits for its end."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel
from serve_app.engine.engine import Engine, EngineConfig
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.types import EngineOutput, EngineRequest, EngineState, PrefillDone, RequestHandle, TokenOutput

TIMEOUT = 60.0


class Answer:
    """The outputs of one request."""

    def __init__(self, n: int = 1) -> None:
        self.events: list[EngineOutput] = []
        self.ended = threading.Event()
        self.handle: RequestHandle | None = None
        self._left = n

    def take(self, event: EngineOutput) -> None:
        """The callback of the engine."""
        self.events.append(event)
        self._left -= isinstance(event, TokenOutput) and event.finish_reason is not None
        if isinstance(event, Exception) or not self._left or (isinstance(event, PrefillDone) and event.finish_reason):
            self.ended.set()

    def wait(self) -> "Answer":
        """Wait until it has ended."""
        assert self.ended.wait(TIMEOUT), f"no end after {len(self.events)} events"
        return self

    def cancel(self) -> None:
        assert self.handle is not None
        self.handle.cancel()

    @property
    def prefill_done(self) -> PrefillDone:
        first = self.wait().events[0]
        assert isinstance(first, PrefillDone), repr(first)
        return first

    def tokens(self, index: int = 0) -> list[int]:
        return [event.token_id for event in self.token_outputs(index)]

    def token_outputs(self, index: int = 0) -> list[TokenOutput]:
        self.wait()
        return [event for event in self.events if isinstance(event, TokenOutput) and event.index == index]

    @property
    def error(self) -> Exception:
        last = self.wait().events[-1]
        assert isinstance(last, Exception), repr(last)
        return last


@contextmanager
def engine_of(loaded: LoadedModel, plan: BudgetPlan, pool: int = 1 << 24, **limits: Any) -> Iterator[Engine]:
    engine = Engine(loaded, plan, EngineConfig(pool, **limits))
    try:
        yield engine
    finally:
        engine.close()


def ask(engine: Engine, prompt: Any, tokens: int = 20, take: Any = None, **options: Any) -> Answer:
    """Submit a request with options of `EngineRequest` and of `SamplingParams`; `take` also gets every output."""
    own = {name: options.pop(name) for name in list(options) if name in EngineRequest.__dataclass_fields__}
    answer = Answer(own.get("n", 1))

    def deliver(event: EngineOutput) -> None:
        answer.take(event)
        if take:
            take(event)

    sampling = SamplingParams(tokens, **({"temperature": 0.0} | options))
    (answer.handle,) = engine.submit((EngineRequest(tuple(prompt), sampling, **own), deliver))
    return answer


def until(true: Callable[[], Any]) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + TIMEOUT
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def idle(engine: Engine) -> None:
    """Wait until the engine has nothing to do."""
    until(lambda: not (engine.state().running or engine.state().waiting or engine._scheduler.has_work))
    until(lambda: _busy_bytes(engine.state()) == 0)


def _busy_bytes(state: EngineState) -> int:
    return state.allocated_bytes - state.prefix_cache_bytes - state.cached_prompt_bytes
