"""An engine that says what a test tells it to, for facts about what is made of its words."""

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
    full_entries=0,
    cached_entries=0,
    draining=False,
    alive=True,
    plan="plan",
)


class _Handle:
    def __init__(self, engine: "ScriptedEngine", work: EngineRequest) -> None:
        self._engine, self._work = engine, work

    def cancel(self) -> None:
        self._engine.cancelled.append(self._work)

    def complete(self, index: int) -> None:
        self._engine.completed.append((self._work, index))


def _tell(deliver: OutputCallback, events: Iterable[EngineOutput]) -> None:
    for event in events:
        deliver(event)


class ScriptedEngine:
    """`script` gives the events of a request; an exception in its place is raised by submit."""

    def __init__(self, plan: Any, script: Callable[[EngineRequest], Iterable[EngineOutput]]) -> None:
        self.plan, self._script = plan, script
        self.works: list[EngineRequest] = []
        self.cancelled: list[EngineRequest] = []
        self.completed: list[tuple[EngineRequest, int]] = []
        self.now = STATE

    def submit(self, *asked: tuple[EngineRequest, OutputCallback]) -> list[RequestHandle]:
        scripts = []
        for work, deliver in asked:
            self.works.append(work)
            events = self._script(work)
            if isinstance(events, Exception):
                raise events
            scripts.append((deliver, events))
        for deliver, events in scripts:
            threading.Thread(target=_tell, args=(deliver, events), daemon=True).start()
        return [_Handle(self, work) for work, _ in asked]

    def swap_plan(self, plan: Any) -> None:
        self.plan = plan

    def drain(self) -> None:
        pass

    def state(self) -> EngineState:
        return self.now
