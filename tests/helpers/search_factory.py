"""Search spaces, tasks and trial records for tests."""

import random

from baklava.plan.geometry import CacheGeometry, ModelIdentity
from baklava.profiling.profile import Profile
from tuning.optimizers.baselines import initial_params
from tuning.selection.validation import Candidate, ValidatedPlan
from tuning.study.objective import Goal
from tuning.study.search_space import SearchTask
from tuning.study.trial import TrialRecord

SOURCES = ("value", "key", "query", "hidden")


WINDOWS = ("a", "b", "c", "d")


def profile() -> Profile:
    source = random.Random(0)
    geometry = CacheGeometry(layers=5, kv_heads=2, query_group=2, head_dim=8, windows=(None,) * 5)
    grid = tuple(tuple(source.random() for _ in range(4)) for _ in range(5))
    return Profile(
        model=ModelIdentity(id="made up", config_hash="0"),
        geometry=geometry,
        windows="none",
        importance=dict.fromkeys(SOURCES, grid),
        layer_importance=tuple(source.random() for _ in range(5)),
    )


def task(budget: float | None = 0.3, **goal: object) -> SearchTask:
    return SearchTask(profile(), Goal(budget=budget, **goal), context_length=2048, windows=WINDOWS)


SPACE = task().space


def record(
    number: int, values: list[float], status: str = "finished", ratio: float = 0.3, **params: object
) -> TrialRecord:
    scores = [dict.fromkeys(("nll_full", "nll", "dnll", "kl", "allocated_bytes", "seconds"), value) for value in values]
    mean = sum(values) / len(values) if values else 0.0
    chosen = {**initial_params(SPACE)[0], **params}
    return TrialRecord(
        trial=number,
        params=chosen,
        metrics={"kl_geometric": mean, "dnll": mean, "ppl": 1.0, "ratio": ratio},
        status=status,
        windows=tuple(scores),
    )


def report(values: list[float], ratio: float = 0.3) -> dict[str, object]:
    numbers = {"objective": sum(values) / len(values), "ratio": ratio, "training_iteration": len(values)}
    return {**numbers, "windows": record(1, values).windows}


def scored(name: str, ratio: float, loss: float) -> ValidatedPlan:
    metrics = {"ratio": ratio, "dnll": loss, "kl": loss, "kl_geometric": loss, "ppl": 1 + loss}
    plan = task().plan({**initial_params(SPACE)[0], "budget": ratio})
    windows = tuple({"kl": loss * weight, "document": f"text {weight}"} for weight in (1, 2))
    return ValidatedPlan(Candidate(name, plan), windows, metrics)
