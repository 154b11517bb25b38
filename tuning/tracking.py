"""The record in MLflow: a parent run per search, a child per trial, and the winner as a registered champion."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from baklava.plan import BudgetPlan
from baklava.progress import say
from tuning.heatmap import draw
from tuning.server import PARENT_TAG, WRITE_ERRORS, connect, first_line, now, refused
from tuning.settings import SearchSettings
from tuning.trials import TrialRecord

CHAMPION = "champion"

SHIFTS = "shifts"
"""The parameter of a refinement that grows with the model's heads: MLflow takes no parameter above 6,000 characters."""


class Tracker:
    """Writes to MLflow through a client of its own, touching no global state of MLflow.

    A server that goes down later loses nothing that matters: `trials.jsonl` has every trial. What could not be written
    is tried once more at the end.
    """

    def __init__(self, client: MlflowClient, experiment: str, name: str) -> None:
        self.client, self.experiment, self.name = client, experiment, name
        self.parent = ""
        self.missed: list[Callable[[], None]] = []

    @classmethod
    def connect(cls, model_name: str) -> Self:
        """A tracker on a server that answers, for the experiment and the registered model of this name.

        Raises:
            UserError: it does not.
        """
        client, experiment = connect(f"baklava/{model_name}")
        return cls(client, experiment, f"baklava-{model_name}")

    def begin(self, settings: SearchSettings, out: Path) -> str:
        """Create the parent run; returns its id. Raises UserError when the server went down meanwhile."""
        tags = {"baklava.out": str(out.absolute())}
        params = [Param(key, str(value)) for key, value in settings.model_dump().items()]
        with refused("start it again"):
            self.parent = self.client.create_run(self.experiment, run_name=out.name, tags=tags).info.run_id
            self.client.log_batch(self.parent, params=params)
        return self.parent

    def resume(self, parent: str) -> None:
        """Go on under an earlier parent run; raises UserError when the server does not have it."""
        self.parent = parent
        with refused("set MLFLOW_TRACKING_URI to where the search began"):
            self.client.update_run(parent, status="RUNNING")

    def trial(self, record: TrialRecord, plan: BudgetPlan | None, seconds: float) -> None:
        """Write a finished trial as a child run, in one go: a search that is killed leaves no child half done."""
        ended = now()
        self._try(lambda: self._child(record, plan, ended - int(1000 * seconds), ended))

    def champion(self, plan: BudgetPlan, tags: Mapping[str, str]) -> str | None:
        """Register the winner and point the alias at it; returns its `models:/` URI, None where MLflow is down."""
        return f"models:/{self.name}@{CHAMPION}" if self._try(lambda: self._register(plan, tags)) else None

    def end(self, metrics: Mapping[str, float], files: Sequence[Path], status: str = "FINISHED") -> None:
        """Write what was missed, then close the parent run."""
        missed, self.missed = self.missed, []
        written = [self._attempt(write) for write in missed[:1]]
        if all(written):
            written += [self._attempt(write) for write in (*missed[1:], lambda: self._close(metrics, files, status))]
        if not all(written):
            say("mlflow: some of this search is missing there; trials.jsonl and plan.json have all of it")

    def _child(self, record: TrialRecord, plan: BudgetPlan | None, started: int, ended: int) -> None:
        tags = {PARENT_TAG: self.parent, "baklava.status": record.status, "baklava.trial": str(record.trial)}
        name = f"trial {record.trial}"
        run = self.client.create_run(self.experiment, start_time=started, tags=tags, run_name=name).info.run_id
        params = [Param(key, str(value)) for key, value in record.params.items() if key != SHIFTS]
        error = [RunTag("baklava.error", record.error[:5000])] if record.error else []
        self.client.log_batch(run, metrics=_curves(record, ended), params=params, tags=error)
        if plan is not None:
            self._plan_artifacts(run, plan, "plan.json")
        if SHIFTS in record.params:
            self.client.log_text(run, json.dumps(record.params[SHIFTS]), f"{SHIFTS}.json")
        self.client.set_terminated(run, "FAILED" if record.status == "failed" else "FINISHED", end_time=ended)

    def _plan_artifacts(self, run: str, plan: BudgetPlan, path: str) -> None:
        self.client.log_text(run, plan.model_dump_json(indent=1), path)
        with TemporaryDirectory() as folder:
            self.client.log_artifact(run, str(draw(plan, Path(folder) / "budgets.png")))

    def _register(self, plan: BudgetPlan, tags: Mapping[str, str]) -> None:
        self._plan_artifacts(self.parent, plan, "plan/plan.json")
        if not self.client.search_registered_models(f"name = '{self.name}'"):
            self.client.create_registered_model(self.name, description="KV-cache budget plans found by baklava")
        source = f"runs:/{self.parent}/plan"
        version = self.client.create_model_version(self.name, source, run_id=self.parent, tags=dict(tags)).version
        self.client.set_registered_model_alias(self.name, CHAMPION, version)

    def _close(self, metrics: Mapping[str, float], files: Sequence[Path], status: str) -> None:
        at = now()
        self.client.log_batch(self.parent, metrics=[Metric(key, value, at, 0) for key, value in metrics.items()])
        for path in files:
            self.client.log_artifact(self.parent, str(path))
        self.client.set_terminated(self.parent, status)

    def _try(self, write: Callable[[], None]) -> bool:
        """Write now, or at the end: once the server is known to be down, no trial waits for it again."""
        if not self.missed and self._attempt(write):
            return True
        self.missed.append(write)
        return False

    def _attempt(self, write: Callable[[], None]) -> bool:
        try:
            write()
        except WRITE_ERRORS as error:
            say(f"mlflow: cannot write ({first_line(error)}); the search goes on, trials.jsonl has every trial")
            return False
        return True


def _curves(record: TrialRecord, at: int) -> list[Metric]:
    """The trial's means, and its score on each window as a step."""
    means = [Metric(key, value, at, 0) for key, value in record.metrics.items()]
    steps = enumerate(record.windows, start=1)
    return means + [Metric(f"window_{key}", window[key], at, step) for step, window in steps for key in ("kl", "dnll")]
