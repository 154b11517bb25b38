"""A trial in MLflow: a child run, written exactly once even if requests fail on the way."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from baklava.evaluation.heat_map import plot_heat_map
from baklava.evaluation.intervals import format_share
from baklava.plan.budget_plan import BudgetPlan
from tuning.reporting.html import standalone_svg
from tuning.study.trial import TrialRecord
from tuning.tracking.client import PARENT_TAG

TRIAL_TAG = "baklava.trial"
MAX_ERROR_CHARACTERS = 5000

SHIFTS = "shifts"
"""The parameter of a refinement that grows with the model's heads; MLflow allows 6,000 characters a parameter."""

NAMING_PARAMS = ("allocation", "bits", "eviction")
"""Parameters that appear in a trial's name."""

WINDOW_METRICS = ("kl", "dnll", "seconds")
"""Metrics of a child run with one step per window."""

PARENT_METRICS = ("kl_geometric", "dnll", "ratio")
"""Metrics of the parent run with one step per trial that scored all windows."""


@dataclass(frozen=True)
class FinishedTrial:
    """A trial that ended, with its start and end in milliseconds; `make_plan` returns None if it has no plan."""

    record: TrialRecord
    make_plan: Callable[[], BudgetPlan | None]
    started_ms: int
    ended_ms: int


class TrialRunWriter:
    """Writes the child runs of a search.

    It asks the server which trials are written already, once and after every failure.

    Args:
        client: The client of the server.
        experiment: Id of the experiment.
        parent_run: Id of the search's run.
        search_name: Name of the search, at the end of the names of its trials.
    """

    def __init__(self, client: MlflowClient, experiment: str, parent_run: str, search_name: str) -> None:
        self.client, self.experiment = client, experiment
        self.parent_run, self.search_name = parent_run, search_name
        self.written: set[int] | None = None

    def write(self, trial: FinishedTrial) -> None:
        """Write a trial, unless it is there: a request that failed may still have reached the server."""
        if self.written is None:
            self.written = self._find_written()
        if trial.record.trial in self.written:
            return
        try:
            self._create(trial)
        except BaseException:
            self.written = None
            raise
        self.written.add(trial.record.trial)

    def _find_written(self) -> set[int]:
        """Numbers of the complete trials. A run that a kill left incomplete is deleted, to be written again."""
        children = self._children()
        for run in children:
            if run.info.status == "RUNNING":
                self.client.delete_run(run.info.run_id)
        return {int(run.data.tags[TRIAL_TAG]) for run in children if run.info.status != "RUNNING"}

    def _children(self) -> list[Run]:
        query = f"tags.`{PARENT_TAG}` = '{self.parent_run}'"
        runs: list[Run] = []
        page_token = None
        while True:
            page = self.client.search_runs([self.experiment], query, page_token=page_token)
            runs += [run for run in page if TRIAL_TAG in run.data.tags]
            page_token = page.token
            if not page_token:
                return runs

    def _create(self, trial: FinishedTrial) -> None:
        record, plan, at = trial.record, trial.make_plan(), trial.ended_ms
        run = self.client.create_run(
            self.experiment,
            start_time=trial.started_ms,
            run_name=trial_run_name(record, self.search_name),
            tags={PARENT_TAG: self.parent_run, "baklava.status": record.status, TRIAL_TAG: str(record.trial)},
        ).info.run_id
        metrics = [Metric(name, value, at, 0) for name, value in record.metrics.items()]
        metrics += [
            Metric(f"window_{name}", window[name], at, step)
            for step, window in enumerate(record.windows, start=1)
            for name in WINDOW_METRICS
            if name in window
        ]
        params = [Param(name, str(value)) for name, value in record.params.items() if name != SHIFTS]
        error = [RunTag("baklava.error", record.error[:MAX_ERROR_CHARACTERS])] if record.error else []
        self.client.log_batch(run, metrics=metrics, params=params, tags=error)
        if plan is not None:
            log_plan(self.client, run, plan)
        if SHIFTS in record.params:
            self.client.log_text(run, json.dumps(record.params[SHIFTS]), f"{SHIFTS}.json")
        if record.status == "finished":
            curve = [
                Metric(f"trial_{name}", record.metrics[name], at, record.trial)
                for name in PARENT_METRICS
                if name in record.metrics
            ]
            self.client.log_batch(self.parent_run, metrics=curve)
        # Last: a run that has ended is complete.
        self.client.set_terminated(run, "FAILED" if record.status == "failed" else "FINISHED", end_time=at)


def log_plan(client: MlflowClient, run: str, plan: BudgetPlan, folder: str = "") -> None:
    """Log a plan and its heat map; a plan to be registered goes into a folder of its own."""
    client.log_text(run, plan.model_dump_json(indent=1), f"{folder}plan.json")
    client.log_text(run, standalone_svg(plot_heat_map(plan)), "budgets.svg")


def trial_run_name(record: TrialRecord, search_name: str) -> str:
    """Return a trial's name: `trial 07 from 03, blended, k4v2, heavy_hitter, 12.5%, mine`."""
    number = f"trial {record.trial:02}" + (f" from {record.parent_trial:02}" if record.parent_trial else "")
    choices = [str(record.params[name]) for name in NAMING_PARAMS if name in record.params]
    size = [format_share(record.metrics["ratio"])] if "ratio" in record.metrics else []
    return ", ".join([number, *choices, *size, search_name])
