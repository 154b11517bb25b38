"""A replica: one copy of the model that keeps its prefilled windows, and scores plan after plan against them."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from baklava.model import load
from baklava.plan import BudgetPlan
from baklava.scoring import Prefilled, Score, prefill, score
from baklava.windows import Window
from tuning.space import evictions


class Replica:
    """Scores a plan on a window. Prefills a window when it first meets it, since that does not depend on the plan.

    Runs as a Ray actor. A killed one comes back with the model and no windows.
    """

    def __init__(self, model: str, threads: int) -> None:
        self.loaded = load(model, threads=threads)
        self.prefilled: dict[str, Prefilled] = {}

    def ready(self) -> int:
        """Process id, once the model is in memory."""
        return os.getpid()

    def warm(self, window: Window) -> None:
        """Prefill a window unless it is held."""
        self._held(window)

    def forget(self, windows: Sequence[str]) -> None:
        """Free windows that no plan will be scored on again."""
        for name in windows:
            self.prefilled.pop(name, None)

    def score(self, plan_json: str, window: Window) -> dict[str, Any]:
        """Scores of a plan on a window, or {"error": reason}: a plan that fails once would fail again."""
        try:
            return _plain(score(self.loaded, self._held(window), BudgetPlan.model_validate_json(plan_json)))
        except Exception as error:  # whatever a plan causes is the trial's result, not the end of the replica
            return {"error": f"{type(error).__name__}: {error}"}

    def _held(self, window: Window) -> Prefilled:
        if window.name not in self.prefilled:
            self.prefilled[window.name] = prefill(self.loaded, window, evictions())
        return self.prefilled[window.name]


def _plain(result: Score) -> dict[str, Any]:
    return {**asdict(result), "dnll": result.dnll}
