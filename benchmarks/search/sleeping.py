"""A replica that sleeps where others score, so that only the dispatch is timed. It loads no model, and not torch."""

import os
import time
from collections.abc import Sequence
from typing import Any


class Sleeper:
    """Answers as a replica does, every plan with the same scores, after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def ready(self) -> int:
        """Process id."""
        return os.getpid()

    def warm(self, window: Any) -> None:
        """Nothing to prefill."""

    def told(self) -> None:
        """Nothing is kept elsewhere."""

    def forget(self, windows: Sequence[str]) -> None:
        """Nothing to free."""

    def score(self, plan_json: str, window: Any) -> dict[str, Any]:
        """The same scores for all."""
        time.sleep(self.seconds)
        numbers = {"nll_full": 1.0, "nll": 1.1, "dnll": 0.1, "kl": 0.1, "allocated_bytes": 1, "seconds": self.seconds}
        return {"window": window.name, "document": window.document, **numbers}
