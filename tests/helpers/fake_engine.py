"""An engine whose outputs a test scripts, for tests of what the API makes of them."""

import threading
from collections.abc import Callable, Iterable
from typing import Any

from serve_app.engine.types import EngineOutput, EngineRequest, EngineState, OutputCallback, RequestHandle

STATE = EngineState(
    running=0,
    waiting=0,
    pool_bytes=1 << 20,
    reserved_bytes=0,
    allocated_bytes=0,
    peak_bytes=0,
    prefix_cache_bytes=0,
    cached_prompt_bytes=0,
    full_entries=0,
    cached_entries=0,
    draining=False,
    alive=True,
    plan="plan",
)


class _Handle:
    def __init__(self, engine: "ScriptedEngine", request: EngineRequest) -> None:
        self._engine, self._request = engine, request

    def cancel(self) -> None:
        self._engine.cancelled.append(self._request)

    def stop_sequence(self, index: int) -> None:
        self._engine.stopped.append((self._request, index))


def _deliver(deliver: OutputCallback, events: Iterable[EngineOutput]) -> None:
    for event in events:
        deliver(event)


class ScriptedEngine:
    """`script` returns the outputs of a request, or an exception that submit raises."""

    def __init__(self, plan: Any, script: Callable[[EngineRequest], Iterable[EngineOutput]]) -> None:
        self.plan, self._script = plan, script
        self.works: list[EngineRequest] = []
        self.cancelled: list[EngineRequest] = []
        self.stopped: list[tuple[EngineRequest, int]] = []
        self.now = STATE

    def submit(self, *requests: tuple[EngineRequest, OutputCallback]) -> list[RequestHandle]:
        scripts = []
        for request, deliver in requests:
            self.works.append(request)
            events = self._script(request)
            if isinstance(events, Exception):
                raise events
            scripts.append((deliver, events))
        for deliver, events in scripts:
            threading.Thread(target=_deliver, args=(deliver, events), daemon=True).start()
        return [_Handle(self, request) for request, _ in requests]

    def swap_plan(self, plan: Any) -> None:
        self.plan = plan

    def drain(self) -> None:
        pass

    def state(self) -> EngineState:
        return self.now
