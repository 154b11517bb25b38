"""The work of an evaluation: item after item, in this process or on replicas of the model."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from baklava.evaluation import Evaluator, PromptResult, WindowResult
from baklava.model import LoadedModel, load
from baklava.plan import BudgetPlan
from baklava.progress import say
from baklava.windows import Window
from tuning.evaluation.folder import Item, Material

RESTARTS = 3
"""Times that an item is given out again because its replica died."""


def done(evaluator: Evaluator, item: Item) -> WindowResult | PromptResult:
    """The result of one item."""
    if isinstance(item, Window):
        return evaluator.window(item)
    return evaluator.prompt(item.task, item.prompt)


def results(
    loaded: LoadedModel, material: Material, items: Sequence[Item], replicas: int | str
) -> Iterator[WindowResult | PromptResult]:
    """The results of all items as they come, in any order.

    "auto" is one replica per GPU of the cluster at `$RAY_ADDRESS` or of this machine where it has several, else this
    process.
    """
    plans = [named.plan for named in material.plans]
    if replicas == 1 or (replicas == "auto" and not (os.environ.get("RAY_ADDRESS") or torch.cuda.device_count() > 1)):
        evaluator = Evaluator(loaded, plans)
        yield from (done(evaluator, item) for item in items)
    else:
        yield from _on_replicas(loaded.identity.id, plans, items, replicas)


class EvaluationReplica:
    """One copy of the model and all plans. Runs as a Ray actor."""

    def __init__(self, model: str, threads: int, plans: Sequence[str]) -> None:
        self.evaluator = Evaluator(load(model, threads=threads), [BudgetPlan.model_validate_json(p) for p in plans])

    def done(self, item: Item) -> WindowResult | PromptResult:
        """The result of one item."""
        return done(self.evaluator, item)


def _on_replicas(model: str, plans: Sequence[BudgetPlan], items: Sequence[Item], asked: int | str) -> Iterator[Any]:
    # Here, since one process alone needs no Ray.
    import ray
    from ray.util import ActorPool

    from tuning.cluster import present_fleet, session

    with session():
        fleet = present_fleet(asked)
        say(f"evaluating on {fleet.replicas} replicas with {fleet.threads} threads each")
        replica = ray.remote(EvaluationReplica).options(**fleet.options | {"max_task_retries": RESTARTS})
        written = [plan.model_dump_json() for plan in plans]
        pool = ActorPool([replica.remote(model, fleet.threads, written) for _ in range(fleet.replicas)])
        yield from pool.map_unordered(lambda actor, item: actor.done.remote(item), items)
