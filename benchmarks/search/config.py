"""Sizes of the search benchmark."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SearchBenchmarkConfig:
    """What is searched, and at which size.

    Attributes:
        context: tokens prefilled per window.
        continuation: tokens scored per window.
        trials: of the search that is timed as a script.
        baseline_trials: how many of them are repeated with one process per trial.
        scaling_trials: trials of each search with one and with two workers.
        dispatch_workers: numbers of sleeping workers.
        dispatch_trials: trials of each search with sleeping workers.
        sleep_seconds: what a sleeping worker takes for a window.
        budget: the searched plan's share of the full cache's bytes.
    """

    model: str = "demo"
    texts: str = "botocore"
    context: int = 3072
    continuation: int = 512
    trials: int = 32
    baseline_trials: int = 1
    scaling_trials: int = 16
    dispatch_workers: tuple[int, ...] = (1, 2, 4, 8, 16)
    dispatch_trials: int = 48
    sleep_seconds: float = 0.05
    budget: float = 0.3


def quick_config(model: str = "demo", texts: str = "botocore") -> SearchBenchmarkConfig:
    """Return sizes that show that the benchmark runs; their results mean nothing."""
    return SearchBenchmarkConfig(
        model,
        texts,
        context=256,
        continuation=32,
        trials=6,
        scaling_trials=6,
        dispatch_workers=(1, 2),
        dispatch_trials=8,
        sleep_seconds=0.01,
    )
