"""The work of an evaluation: item after item, in this process or on replicas of the model."""

import os
from collections.abc import Iterator, Sequence
from socket import gethostname
from typing import Any

import torch

from baklava.console import log
from baklava.data.windows import Window
from baklava.errors import UserError
from baklava.evaluation.evaluator import Evaluator, PromptResult, WindowResult
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel, load
from tuning.evaluation.run_dir import Item, Material

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
    if not items:
        return
    if replicas == 1 or (replicas == "auto" and not (os.environ.get("RAY_ADDRESS") or torch.cuda.device_count() > 1)):
        evaluator = Evaluator(loaded, plans)
        yield from (done(evaluator, item) for item in items)
    else:
        yield from _on_replicas(loaded, plans, items, replicas)


class EvaluationReplica:
    """One copy of the model and all plans. Runs as a Ray actor."""

    def __init__(self, model: str, weights: str, threads: int, plans: Sequence[str]) -> None:
        loaded = load(model, threads=threads)
        if loaded.weights_digest != weights:
            raise UserError(f"{model} has other weights on {gethostname()} than here; give every machine the same ones")
        self.evaluator = Evaluator(loaded, [BudgetPlan.model_validate_json(plan) for plan in plans])

    def done(self, item: Item) -> WindowResult | PromptResult:
        """The result of one item."""
        return done(self.evaluator, item)


def _on_replicas(
    loaded: LoadedModel, plans: Sequence[BudgetPlan], items: Sequence[Item], asked: int | str
) -> Iterator[Any]:
    # Here, since one process alone needs no Ray.
    import ray
    from ray.exceptions import RayError
    from ray.util import ActorPool

    from tuning.workers.cluster import OBJECT_STORE_BYTES, cluster_layout
    from tuning.workers.scheduler import error_summary

    with ray_session(object_store_bytes=OBJECT_STORE_BYTES):
        fleet = cluster_layout(asked)
        log(f"evaluating on {fleet.replicas} replicas with {fleet.threads} threads each")
        replica = ray.remote(EvaluationReplica).options(**fleet.options | {"max_task_retries": RESTARTS})
        written = [plan.model_dump_json() for plan in plans]
        given = (loaded.identity.id, loaded.weights_digest, fleet.threads, written)
        pool = ActorPool([replica.remote(*given) for _ in range(fleet.replicas)])
        try:
            yield from pool.map_unordered(lambda actor, item: actor.done.remote(item), items)
        except RayError as error:
            raise UserError(f"a replica failed ({error_summary(error)}); put that right, or use --replicas 1") from error
