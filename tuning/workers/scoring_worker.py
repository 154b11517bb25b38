"""The windows that a replica keeps prefilled: on its device, then in host memory, then not at all."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from baklava.data.windows import Window
from baklava.evaluation.window_scoring import Prefilled, Score, decode_seconds, prefill, score
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.host_memory import total_host_bytes
from baklava.runtime.model_loader import load
from tuning.study.search_space import recorded_evictions
from tuning.study.trial import DECODE_SECONDS

Where = Literal["device", "host", "nowhere"]
Thing = TypeVar("Thing")

GIB = 1 << 30


@dataclass
class PrefillStore:
    """Keeps prefilled windows within `device` and `host` bytes; None is no limit.

    Who comes first stays: windows are asked for in turn, again and again, and where the longest unused had to go, each
    would go just before it is asked for. What fits nowhere is prefilled anew for every score.
    """

    device: int | None = None
    host: int | None = 0
    held: dict[str, Prefilled] = field(default_factory=dict)
    where: dict[str, Where] = field(default_factory=dict)
    devices: dict[str, list[torch.device]] = field(default_factory=dict)

    def get(self, name: str, prefill: Callable[[], Prefilled]) -> Prefilled:
        """The window on the device, from where it is kept, else prefilled and kept where there is room."""
        if self.where.get(name) == "host":
            return restored(self.held[name], self.devices[name])
        if name in self.held:
            return self.held[name]
        window = prefill()
        self._keep(name, window)
        return window

    def forget(self, name: str) -> None:
        """Make room."""
        self.held.pop(name, None)
        self.where.pop(name, None)
        self.devices.pop(name, None)

    def shrink(self) -> bool:
        """Move what is on the device away, since it ran out of memory; whether there was anything."""
        there = [name for name, where in self.where.items() if where == "device"]
        self.device = 0
        for name in there:
            del self.where[name]
            self._keep(name, self.held.pop(name))
        return bool(there)

    def told(self) -> str | None:
        """Which windows are not on the device, in words; None where all are."""
        count = Counter(self.where.values())
        parts = [(count["host"], "in host memory"), (count["nowhere"], "not at all, to be prefilled for every score")]
        away = [f"{number} {place}" for number, place in parts if number]
        kept = sum(map(size_of, self.held.values())) / GIB
        return f"keeps {count['device']} windows on its device, {', '.join(away)} ({kept:.3g} GiB)" if away else None

    def _keep(self, name: str, window: Prefilled) -> None:
        size = size_of(window)
        if self._room("device", self.device, size):
            self.held[name], self.where[name] = window, "device"
        elif self._room("host", self.host, size):
            self.held[name], self.devices[name] = spilled(window)
            self.where[name] = "host"
        else:
            self.where[name] = "nowhere"

    def _room(self, where: Where, limit: int | None, size: int) -> bool:
        used = sum(size_of(self.held[name]) for name, place in self.where.items() if place == where)
        return limit is None or used + size <= limit


def size_of(window: Prefilled) -> int:
    """Bytes of all its tensors."""
    sizes: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    mapped(window, count)
    return sum(sizes)


def spilled(window: Prefilled) -> tuple[Prefilled, list[torch.device]]:
    """The window in host memory, and the device of each of its tensors: a model may lie on several."""
    devices: list[torch.device] = []

    def move(tensor: Tensor) -> Tensor:
        devices.append(tensor.device)
        return tensor.to("cpu")

    return mapped(window, move), devices


def restored(window: Prefilled, devices: Sequence[torch.device]) -> Prefilled:
    """A spilled window, where it was."""
    places = iter(devices)
    return mapped(window, lambda tensor: tensor.to(next(places)))


def mapped(thing: Thing, change: Callable[[Tensor], Tensor]) -> Thing:
    """A record, and all records, tuples and dictionaries in it, with every tensor changed."""
    result: Any = thing
    if isinstance(thing, Tensor):
        result = change(thing)
    elif isinstance(thing, tuple):
        result = tuple(mapped(each, change) for each in thing)
    elif isinstance(thing, dict):
        result = {name: mapped(each, change) for name, each in thing.items()}
    elif is_dataclass(thing) and not isinstance(thing, type):
        values = {each.name: getattr(thing, each.name) for each in fields(thing)}
        result = replace(thing, **{name: mapped(value, change) for name, value in values.items()})
    return result


Result = TypeVar("Result")


class ScoringWorker:
    """Scores a plan on a window. Prefills a window when it first meets it, since that does not depend on the plan.

    Runs as a Ray actor. A killed one comes back with the model and no windows. `spread` lays the model over all GPUs
    that the actor has. At most `memory` GiB of windows stay on the model's device, and others in `host_share` of the
    host's memory. `timed` ones time decoding, too.
    """

    def __init__(
        self,
        model: str,
        threads: int,
        *,
        spread: bool = False,
        memory: float | None = None,
        host_share: float = 0,
        timed: bool = False,
    ) -> None:
        self.timed = timed
        self.loaded = load(model, threads=threads, device_map_auto=spread)
        limit = None if memory is None else int(memory * GIB)
        # On a CPU the device's memory is the host's.
        host = 0 if self.loaded.device.type == "cpu" else int(host_share * total_host_bytes())
        self.holding = PrefillStore(limit, host)

    def ready(self) -> int:
        """Process id, once the model is in memory."""
        return os.getpid()

    def warm(self, window: Window) -> None:
        """Prefill a window unless it is held."""
        self._with_room(lambda: self._held(window))

    def told(self) -> str | None:
        """Which windows are not kept on the device, in words; None where all are."""
        return self.holding.told()

    def forget(self, windows: Sequence[str]) -> None:
        """Free windows that no plan will be scored on again."""
        for name in windows:
            self.holding.forget(name)

    def score(self, plan_json: str, window: Window) -> dict[str, Any]:
        """Scores of a plan on a window and what `told` says, or {"error": reason}: what fails once would fail again."""
        try:
            plan = BudgetPlan.model_validate_json(plan_json)
            scored = self._with_room(lambda: self._scored(self._held(window), plan))
            return {**scored, "kept": self.holding.told()}
        except Exception as error:  # whatever a plan causes is the trial's result, not the end of the replica
            return {"error": f"{type(error).__name__}: {error}"}

    def _scored(self, held: Prefilled, plan: BudgetPlan) -> dict[str, Any]:
        found = _plain(score(self.loaded, held, plan))
        return {**found, DECODE_SECONDS: decode_seconds(self.loaded, held, plan)} if self.timed else found

    def _held(self, window: Window) -> Prefilled:
        return self.holding.get(window.name, lambda: prefill(self.loaded, window, recorded_evictions()))

    def _with_room(self, work: Callable[[], Result]) -> Result:
        """Do it, and once more without windows on the device where that has run out of memory."""
        try:
            return work()
        except torch.OutOfMemoryError:
            if not self.holding.shrink():
                raise
        torch.cuda.empty_cache()
        return work()


def _plain(result: Score) -> dict[str, Any]:
    return {**asdict(result), "dnll": result.dnll}
