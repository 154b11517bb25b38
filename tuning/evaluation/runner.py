"""An evaluation from settings to a report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baklava.allocation.plan_spec import NamedPlan
from baklava.console import log, progress_bar
from baklava.evaluation.results import Evaluation, compare
from baklava.evaluation.speed.latency import Speed
from baklava.runtime.model_loader import LoadedModel, load
from tuning.evaluation.inputs import prepare
from tuning.evaluation.mlflow_runs import write_runs
from tuning.evaluation.report import write_report
from tuning.evaluation.run_dir import EvaluationRecord, EvaluationSettings, Folder, Material, in_order
from tuning.evaluation.workers import results
from tuning.study.journal import check_new_run_dir
from tuning.tracking.client import connect

LEAST_TOKENS = 32
"""Tokens that a plan must be made for, so that a prompt and some decoded tokens fit."""

Stopwatch = Callable[[LoadedModel, Sequence[NamedPlan]], Mapping[str, Speed]]
"""Measures the plans' speed, by name."""


@dataclass(frozen=True)
class Evaluated:
    """Where a finished evaluation is, and what came out."""

    folder: Folder
    settings: EvaluationSettings
    evaluations: tuple[Evaluation, ...]

    def as_json(self) -> dict[str, Any]:
        """What other people's scripts read: one plan, or several under "plans"."""
        if len(self.evaluations) == 1:
            return self.evaluations[0].as_json()
        return {"plans": [each.as_json() for each in self.evaluations]}


def evaluate(settings: EvaluationSettings, out: Path, stopwatch: Stopwatch) -> Evaluated:
    """Compare plans on windows and prompts; everything goes into the folder `out`.

    Raises:
        UserError: anything a user can put right. Nothing has been written to `out` then.
    """
    check_new_run_dir(out, "evaluation")
    loaded = load(settings.model, threads=settings.threads)
    material = prepare(settings, loaded)
    connect(f"baklava/{settings.model_name}")  # a server that is down is told now, not after half an hour
    folder = Folder(out)
    folder.begin(EvaluationRecord(settings=settings, weights=loaded.weights_digest), material)
    return _run(folder, settings, loaded, material, stopwatch)


def resume(out: Path, stopwatch: Stopwatch) -> Evaluated:
    """Go on with an evaluation that was killed, from the results that it recorded.

    Raises:
        UserError: there is none, or the model has changed since.
    """
    folder = Folder(out)
    record = folder.record()
    settings = record.settings
    loaded = load(settings.model, threads=settings.threads)
    record.check_same(loaded)
    return _run(folder, settings, loaded, folder.material(settings, loaded.model.config.vocab_size), stopwatch)


def _run(
    folder: Folder, settings: EvaluationSettings, loaded: LoadedModel, material: Material, stopwatch: Stopwatch
) -> Evaluated:
    try:
        found = _all_results(folder, settings, loaded, material)
        speeds = _speeds(folder, settings, loaded, material, stopwatch)
    except BaseException:
        log(f"the evaluation ended early; go on with it: python jobs/evaluate.py --resume {folder.path}")
        raise
    windows = in_order(found, [("window", window.name) for window in material.windows])
    prompts = in_order(found, [("prompt", asked.prompt.name) for asked in material.prompts])
    evaluated = Evaluated(folder, settings, tuple(compare(material.plans, windows, prompts, speeds)))
    write_report(evaluated.evaluations, settings, folder.report)
    folder.write_scores(evaluated.as_json())
    write_runs(evaluated.evaluations, settings, folder)
    return evaluated


def _all_results(folder: Folder, settings: EvaluationSettings, loaded: LoadedModel, material: Material) -> list[Any]:
    journal = folder.journal()
    known = {(result.kind, result.name) for result in journal.records}
    missing = [item for key, item in material.items if key not in known]
    counts = f"{len(material.windows)} windows and {len(material.prompts)} prompts"
    log(f"evaluating {len(material.plans)} plans on {counts}, {len(known)} of them done before")
    with progress_bar(len(missing), "evaluating", "items") as progress:
        for result in results(loaded, material, missing, settings.replicas):
            journal.append(result)
            progress.set_postfix_str(result.name)
            progress.update(1)
    return journal.records


def _speeds(
    folder: Folder, settings: EvaluationSettings, loaded: LoadedModel, material: Material, stopwatch: Stopwatch
) -> Mapping[str, Speed]:
    if not settings.speed:
        return {}
    speeds = folder.speeds()
    if speeds is None and material.shortest <= LEAST_TOKENS:
        log(f"speed is left out: plans for {material.shortest} tokens leave too few to time")
        return {}
    if speeds is None:
        log("measuring speed and peak memory, all plans in turns")
        speeds = dict(stopwatch(loaded, material.plans))
        folder.write_speeds(speeds)
    return speeds
