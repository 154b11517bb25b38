"""What is measured, at full size or quickly."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """Sizes of all measurements: tokens of a window, trials of each search, seconds slept per window."""

    model: str = "demo"
    texts: str = "botocore"
    context: int = 3072
    continuation: int = 512
    trials: int = 32
    naive: int = 1
    scaled_trials: int = 16
    dispatched: tuple[int, ...] = (1, 2, 4, 8, 16)
    dispatched_trials: int = 48
    sleep: float = 0.05
    budget: float = 0.3


def quick(model: str = "demo", texts: str = "botocore") -> Asked:
    """Small enough to see that it works; the figures mean nothing."""
    small = {"context": 256, "continuation": 32, "trials": 6, "naive": 1, "scaled_trials": 6}
    return Asked(model, texts, **small, dispatched=(1, 2), dispatched_trials=8, sleep=0.01)
