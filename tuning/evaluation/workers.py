"""Evaluate items in this process, or on workers of a Ray cluster."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from baklava.console import log
from baklava.data.windows import Window
from baklava.evaluation.evaluator import Evaluator, PromptResult, WindowResult
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.ray_session import ray_session, starts_cluster
from tuning.evaluation.run_dir import RESULT, EvaluationInputs, Item
from tuning.workers.scoring_worker import ModelWorker


def evaluate_items(
    loaded: LoadedModel, inputs: EvaluationInputs, items: Sequence[Item], replicas: int | str
) -> Iterator[WindowResult | PromptResult]:
    """Yield the results of all items as they come, in any order.

    With `replicas` "auto" there is one worker per GPU of the cluster at `$RAY_ADDRESS`, or of this machine if it has
    several, and otherwise only this process.
    """
    if not items:
        return
    plans = [named.plan for named in inputs.plans]
    has_cluster = not starts_cluster() or torch.cuda.device_count() > 1
    if replicas == 1 or (replicas == "auto" and not has_cluster):
        evaluator = Evaluator(loaded, plans)
        yield from (evaluate_item(evaluator, item) for item in items)
        return

    # Imported here, since a single process needs no Ray.
    from tuning.workers.cluster import OBJECT_STORE_BYTES, WorkerGroup, cluster_layout

    with ray_session(object_store_bytes=OBJECT_STORE_BYTES):
        layout = cluster_layout(replicas)
        log(f"evaluating on {layout.replicas} replicas with {layout.threads} threads each")
        group = WorkerGroup.launch(
            layout,
            EvaluationWorker,
            loaded.identity.id,
            plans=[plan.model_dump_json() for plan in plans],
            weights_digest=loaded.weights_digest,
        )
        group.wait_until_ready()
        for result in group.map_unordered("evaluate", items):
            yield RESULT.validate_json(result)


def evaluate_item(evaluator: Evaluator, item: Item) -> WindowResult | PromptResult:
    """Return the result of one item."""
    if isinstance(item, Window):
        return evaluator.evaluate_window(item)
    return evaluator.evaluate_prompt(item.task, item.prompt)


class EvaluationWorker(ModelWorker):
    """A replica of the model with all plans. It refuses to start if its weights are not `weights_digest`."""

    def __init__(self, model: str, threads: int, *, plans: Sequence[str], **options: Any) -> None:
        super().__init__(model, threads, **options)
        self.evaluator = Evaluator(self.loaded, [BudgetPlan.model_validate_json(plan) for plan in plans])

    def evaluate(self, item: Item) -> str:
        """Return the result of one item as JSON."""
        return evaluate_item(self.evaluator, item).model_dump_json()
