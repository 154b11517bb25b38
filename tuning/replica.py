"""A replica: one copy of the model that keeps its prefilled windows, and scores plan after plan against them."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from baklava.memory import host_bytes
from baklava.model import load
from baklava.plan import BudgetPlan
from baklava.scoring import Prefilled, Score, decode_seconds, prefill, score
from baklava.windows import Window
from tuning.holding import GIB, Holding
from tuning.space import evictions
from tuning.trials import DECODING

Result = TypeVar("Result")


class Replica:
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
        self.loaded = load(model, threads=threads, spread=spread)
        limit = None if memory is None else int(memory * GIB)
        # On a CPU the device's memory is the host's.
        host = 0 if self.loaded.device.type == "cpu" else int(host_share * host_bytes())
        self.holding = Holding(limit, host)

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
        return {**found, DECODING: decode_seconds(self.loaded, held, plan)} if self.timed else found

    def _held(self, window: Window) -> Prefilled:
        return self.holding.get(window.name, lambda: prefill(self.loaded, window, evictions()))

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
