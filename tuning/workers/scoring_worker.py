"""The worker that scores plans for a search, and the prefilled windows that it stores."""

import logging
import os
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from socket import gethostname
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from baklava.data.windows import Window
from baklava.errors import UserError
from baklava.evaluation.window_scoring import PrefilledWindow, median_decode_seconds, prefill_window, score_plan
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.host_memory import total_host_bytes
from baklava.runtime.model_loader import load
from tuning.study.search_space import recorded_evictions
from tuning.study.trial import DECODE_SECONDS

logger = logging.getLogger(__name__)

Tier = Literal["device", "host", "nowhere"]
Node = TypeVar("Node")
Result = TypeVar("Result")

GIB = 1 << 30


@dataclass
class PrefillStore:
    """Prefilled windows, within limits in bytes of device and host memory; None is no limit.

    Nothing is evicted: access is cyclic, so that LRU would always evict the window needed next. A window that fits
    nowhere is prefilled again for every score.
    """

    max_device_bytes: int | None = None
    max_host_bytes: int | None = 0
    windows: dict[str, PrefilledWindow] = field(default_factory=dict)
    tiers: dict[str, Tier] = field(default_factory=dict)
    devices: dict[str, list[torch.device]] = field(default_factory=dict)

    def get(self, name: str, prefill: Callable[[], PrefilledWindow]) -> PrefilledWindow:
        """Return the window on its device; if it is not stored, prefill it and store it if a limit allows."""
        if self.tiers.get(name) == "host":
            return to_devices(self.windows[name], self.devices[name])
        if name in self.windows:
            return self.windows[name]
        window = prefill()
        self._put(name, window)
        return window

    def release(self, name: str) -> None:
        """Free a window."""
        self.windows.pop(name, None)
        self.tiers.pop(name, None)
        self.devices.pop(name, None)

    def clear_device(self) -> bool:
        """Move all windows off the device for good, since it ran out of memory; return whether there were any."""
        on_device = [name for name, tier in self.tiers.items() if tier == "device"]
        self.max_device_bytes = 0
        for name in on_device:
            del self.tiers[name]
            self._put(name, self.windows.pop(name))
        return bool(on_device)

    def status(self) -> str | None:
        """Return which windows are not on the device, in words; None if all are."""
        count = Counter(self.tiers.values())
        places = [(count["host"], "in host memory"), (count["nowhere"], "not at all, to be prefilled for every score")]
        elsewhere = [f"{number} {place}" for number, place in places if number]
        if not elsewhere:
            return None
        stored = sum(map(tensor_bytes, self.windows.values())) / GIB
        return f"stores {count['device']} windows on its device, {', '.join(elsewhere)} ({stored:.3g} GiB)"

    def _put(self, name: str, window: PrefilledWindow) -> None:
        size = tensor_bytes(window)
        if self._fits("device", self.max_device_bytes, size):
            self.windows[name], self.tiers[name] = window, "device"
        elif self._fits("host", self.max_host_bytes, size):
            self.windows[name], self.devices[name] = to_host(window)
            self.tiers[name] = "host"
        else:
            self.tiers[name] = "nowhere"

    def _fits(self, tier: Tier, limit: int | None, size: int) -> bool:
        used = sum(tensor_bytes(self.windows[name]) for name, place in self.tiers.items() if place == tier)
        return limit is None or used + size <= limit


def tensor_bytes(window: PrefilledWindow) -> int:
    """Return the bytes of all tensors of a window."""
    sizes: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    map_tensors(window, count)
    return sum(sizes)


def to_host(window: PrefilledWindow) -> tuple[PrefilledWindow, list[torch.device]]:
    """Return the window in host memory, and the device of each of its tensors: a model may be on several."""
    devices: list[torch.device] = []

    def move(tensor: Tensor) -> Tensor:
        devices.append(tensor.device)
        return tensor.to("cpu")

    return map_tensors(window, move), devices


def to_devices(window: PrefilledWindow, devices: Sequence[torch.device]) -> PrefilledWindow:
    """Return the window with each tensor on its device, in the order of `to_host`."""
    remaining = iter(devices)
    return map_tensors(window, lambda tensor: tensor.to(next(remaining)))


def map_tensors(node: Node, change: Callable[[Tensor], Tensor]) -> Node:
    """Return a copy of a dataclass with every tensor changed, also in nested dataclasses, tuples and dictionaries."""
    changed: Any = node
    if isinstance(node, Tensor):
        changed = change(node)
    elif isinstance(node, tuple):
        changed = tuple(map_tensors(child, change) for child in node)
    elif isinstance(node, dict):
        changed = {name: map_tensors(child, change) for name, child in node.items()}
    elif is_dataclass(node) and not isinstance(node, type):
        children = {child.name: getattr(node, child.name) for child in fields(node)}
        changed = replace(node, **{name: map_tensors(child, change) for name, child in children.items()})
    return changed


class ModelWorker:
    """A Ray actor with a replica of the model. If its process dies, Ray starts it again and it loads the model again.

    Args:
        model: Name of the model.
        threads: Torch's threads.
        dtype: Precision of the model's products, as in `load`.
        device_map_auto: Whether to spread the model over all GPUs that the actor has.
        weights_digest: Digest that the weights must have on this worker's machine; not checked if None.

    Raises:
        UserError: the model cannot be loaded here, or has other weights.
    """

    def __init__(
        self,
        model: str,
        threads: int,
        *,
        dtype: str | None = None,
        device_map_auto: bool = False,
        weights_digest: str | None = None,
    ) -> None:
        self.loaded = load(model, dtype=dtype, threads=threads, device_map_auto=device_map_auto)
        if weights_digest not in (None, self.loaded.weights_digest):
            raise UserError(f"{model} has other weights on {gethostname()} than here; give every machine the same ones")

    def ping(self) -> int:
        """Return the process id, once the model is loaded."""
        return os.getpid()


class ScoringWorker(ModelWorker):
    """Scores plans on windows. It prefills a window once for all plans, since the prefill does not depend on the plan.

    Args:
        model: Name of the model.
        threads: Torch's threads.
        memory: GiB of prefilled windows on the model's device; no limit if None.
        host_share: Share of the host's memory for windows that do not fit on the device.
        timed: Whether to time decode steps, too.
        options: Those of `ModelWorker`.
    """

    def __init__(
        self,
        model: str,
        threads: int,
        *,
        memory: float | None = None,
        host_share: float = 0,
        timed: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, threads, **options)
        self.timed = timed
        max_device_bytes = None if memory is None else int(memory * GIB)
        # On a CPU, the device's memory is the host's.
        max_host_bytes = 0 if self.loaded.device.type == "cpu" else int(host_share * total_host_bytes())
        self.store = PrefillStore(max_device_bytes, max_host_bytes)

    def prefill(self, window: Window) -> None:
        """Prefill a window unless it is stored."""
        self._retry_without_windows(lambda: self._prefilled(window))

    def release(self, windows: Sequence[str]) -> None:
        """Free windows that no plan will be scored on any more."""
        for name in windows:
            self.store.release(name)

    def status(self) -> str | None:
        """Return which windows are not stored on the device, in words; None if all are."""
        return self.store.status()

    def score(self, plan_json: str, window: Window) -> dict[str, Any]:
        """Return the scores of a plan on a window and the worker's `status`, or {"error"} with the reason.

        An error that is not the user's also has its "traceback". Whatever a plan causes is the trial's result and not
        the end of the worker: what fails once would fail again.
        """
        try:
            plan = BudgetPlan.model_validate_json(plan_json)
            scores = self._retry_without_windows(lambda: self._score(window, plan))
        except UserError as error:
            return {"error": str(error)}
        except Exception as error:
            logger.exception("cannot score a plan on window %s", window.name)
            return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        return {**scores, "status": self.store.status()}

    def _score(self, window: Window, plan: BudgetPlan) -> dict[str, Any]:
        prefilled = self._prefilled(window)
        result = score_plan(self.loaded, prefilled, plan)
        scores = {**asdict(result), "dnll": result.dnll}
        return {**scores, DECODE_SECONDS: median_decode_seconds(self.loaded, prefilled, plan)} if self.timed else scores

    def _prefilled(self, window: Window) -> PrefilledWindow:
        evictions = recorded_evictions(self.loaded.moves_queries)
        return self.store.get(window.name, lambda: prefill_window(self.loaded, window, evictions))

    def _retry_without_windows(self, work: Callable[[], Result]) -> Result:
        """Run `work`; if the device runs out of memory, move the windows off it and run `work` once more."""
        try:
            return work()
        except torch.OutOfMemoryError:
            if not self.store.clear_device():
                raise
        torch.cuda.empty_cache()
        return work()
