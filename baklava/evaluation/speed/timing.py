"""Time several runs in interleaved rounds, so that a machine that slows down slows all of them."""

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
    """Seconds that one run took in each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median, a measure of the machine's noise; NaN for fewer than 3 rounds."""
        if len(self.seconds) < 3:
            return float("nan")
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median

    def ratio_to(self, other: "Timing") -> float:
        """Return the median over rounds of this run's time over the other's time in the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def total_ratio_to(self, other: "Timing") -> float:
        """Return this run's total time over the other's, which also counts work that only few rounds do."""
        return sum(self.seconds) / sum(other.seconds)


def time_interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int, warmup_rounds: int = 0) -> dict[str, Timing]:
    """Call every run once per round and rotate which one starts a round. Warm-up rounds are not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(warmup_rounds + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            runs[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warmup_rounds:
                seconds[name].append(time.perf_counter() - started)
    return {name: Timing(tuple(measured)) for name, measured in seconds.items()}


def machine_info() -> dict[str, Any]:
    """Return the hardware and library versions that measurements depend on."""
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
