"""A trial in MLflow: a child run that is written once, whatever fails in between."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from baklava.evaluation.formatting import share
from baklava.plan.budget_plan import BudgetPlan
from tuning.reporting.heat_map import heat_map
from tuning.reporting.svg import standalone
from tuning.study.trial import TrialRecord
from tuning.tracking.client import PARENT_TAG

TRIAL_TAG = "baklava.trial"
SHIFTS = "shifts"
"""The parameter of a refinement that grows with the model's heads: MLflow takes no parameter above 6,000 characters."""

CHOICES = ("allocation", "bits", "eviction")
"""Parameters that tell trials apart at a glance."""

WINDOW_CURVES = ("kl", "dnll", "seconds")
"""What a child shows of every window, as a step each."""

PARENT_CURVES = ("kl_geometric", "dnll", "ratio")
"""What the parent shows of every trial that scored all windows, as a step each."""


@dataclass(frozen=True)
class Ended:
    """A trial that ended, between two times in milliseconds; `plan` makes its plan, None where it has none."""

    record: TrialRecord
    plan: Callable[[], BudgetPlan | None]
    started: int
    ended: int


class TrialRuns:
    """The children of one parent run. Which trials have one is asked of the server, once and after every failure.

    `search` is the name of the search, which all names of children end with.
    """

    def __init__(self, client: MlflowClient, experiment: str, parent: str, search: str) -> None:
        self.client, self.experiment, self.parent, self.search = client, experiment, parent, search
        self.written: set[int] | None = None

    def write(self, trial: Ended) -> None:
        """Write a trial, unless it is there: a request that failed may still have reached the server."""
        if self.written is None:
            self.written = self._whole()
        if trial.record.trial in self.written:
            return
        try:
            self._create(trial)
        except BaseException:
            self.written = None
            raise
        self.written.add(trial.record.trial)

    def _whole(self) -> set[int]:
        """Numbers of the trials that are there; what a kill left half written is deleted, to be written anew."""
        children = self._children()
        for run in children:
            if run.info.status == "RUNNING":
                self.client.delete_run(run.info.run_id)
        return {int(run.data.tags[TRIAL_TAG]) for run in children if run.info.status != "RUNNING"}

    def _children(self) -> list[Run]:
        asked, found, token = f"tags.`{PARENT_TAG}` = '{self.parent}'", [], None
        while True:
            page = self.client.search_runs([self.experiment], asked, page_token=token)
            found += [run for run in page if TRIAL_TAG in run.data.tags]
            token = page.token
            if not token:
                return found

    def _create(self, trial: Ended) -> None:
        record, plan = trial.record, trial.plan()
        tags = {PARENT_TAG: self.parent, "baklava.status": record.status, TRIAL_TAG: str(record.trial)}
        named = {"run_name": trial_run_name(record, self.search), "tags": tags}
        run = self.client.create_run(self.experiment, start_time=trial.started, **named).info.run_id
        params = [Param(key, str(value)) for key, value in record.params.items() if key != SHIFTS]
        error = [RunTag("baklava.error", record.error[:5000])] if record.error else []
        self.client.log_batch(run, metrics=_metrics(record, trial.ended), params=params, tags=error)
        if plan is not None:
            plan_files(self.client, run, plan)
        if SHIFTS in record.params:
            self.client.log_text(run, json.dumps(record.params[SHIFTS]), f"{SHIFTS}.json")
        if record.status == "finished":
            self.client.log_batch(self.parent, metrics=_of_parent(record, trial.ended))
        # Last: where a run has ended, all of it is there.
        self.client.set_terminated(run, "FAILED" if record.status == "failed" else "FINISHED", end_time=trial.ended)


def plan_files(client: MlflowClient, run: str, plan: BudgetPlan, folder: str = "") -> None:
    """A plan and its heat map; what is to be registered lies in a folder of its own."""
    client.log_text(run, plan.model_dump_json(indent=1), f"{folder}plan.json")
    client.log_text(run, standalone(heat_map(plan)), "budgets.svg")


def trial_run_name(record: TrialRecord, search: str) -> str:
    """What a trial is called where runs are compared: `trial 07 from 03, blended, k4v2, heavy_hitter, 12.5%, mine`."""
    base = [f"from {record.parent_trial:02}"] if record.parent_trial else []
    choices = [str(record.params[name]) for name in CHOICES if name in record.params]
    size = [share(record.metrics["ratio"])] if "ratio" in record.metrics else []
    return ", ".join([" ".join([f"trial {record.trial:02}", *base]), *choices, *size, search])


def _metrics(record: TrialRecord, at: int) -> list[Metric]:
    """The trial's means, and its score on each window as a step."""
    means = [Metric(key, value, at, 0) for key, value in record.metrics.items()]
    steps = list(enumerate(record.windows, start=1))
    return means + [
        Metric(f"window_{key}", window[key], at, step)
        for step, window in steps
        for key in WINDOW_CURVES
        if key in window
    ]


def _of_parent(record: TrialRecord, at: int) -> list[Metric]:
    known = {key: record.metrics[key] for key in PARENT_CURVES if key in record.metrics}
    return [Metric(f"trial_{key}", value, at, record.trial) for key, value in known.items()]
