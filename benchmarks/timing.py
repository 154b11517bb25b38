"""Timing contestants in turns, so that a machine that slows down slows them all."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant, round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median: how noisy the machine was."""
        if len(self.seconds) < 3:
            return float("nan")
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median

    def over(self, other: "Timing") -> float:
        """Median over rounds of how many times as long as the other's turn in the same round this one took."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def over_in_all(self, other: "Timing") -> float:
        """How many times as long as the other this one took over all rounds, what happens seldom included."""
        return sum(self.seconds) / sum(other.seconds)


def take_turns(contestants: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 0) -> dict[str, Timing]:
    """Run all contestants once per round, each round beginning with another; `warm_up` rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(warm_up + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            contestants[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
