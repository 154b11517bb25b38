"""The record in MLflow: a parent run per search, a child per trial, and the winner as a registered version."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Self

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import DatasetInput, Metric, Param

from baklava.console import log
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from tuning.selection.promotion import ALIAS, PromotionDecision, CurrentChampion, RegisteredPlan
from tuning.study.settings import SearchRecord, SearchSettings
from tuning.study.trial import TrialRecord
from tuning.tracking.client import WRITE_ERRORS, connect, first_line, now, refused, rejects
from tuning.tracking.run_context import Watch, machine, packages
from tuning.tracking.trial_runs import Ended, TrialRuns, plan_files

RETRY_SECONDS = 15.0
"""Between two attempts to reach a server that was away."""

REPLACES = "baklava.replaces"
"""Tag of a parent run that stands for one that the server has lost: the id of the first."""

Params = dict[str, object]


class Tracker:
    """Writes to MLflow through a client of its own, touching no global state of MLflow.

    Trials are written by a thread, so that no trial waits for a server. One that goes away loses nothing: what is
    waiting is written when it is back, `trials.jsonl` has every trial, and `replay` writes what a kill left out.
    """

    def __init__(self, client: MlflowClient, experiment: str, name: str) -> None:
        self.client, self.experiment, self.name = client, experiment, name
        self.parent_run, self.system_metrics = "", Watch(client.tracking_uri, "")
        self.runs = TrialRuns(client, experiment, "", "")
        self.pending: deque[Ended] = deque()
        self.failed_at: float | None = None
        self.writer = ThreadPoolExecutor(1, "mlflow")

    @classmethod
    def connect(cls, model_name: str) -> Self:
        """A tracker on a server that answers, for the experiment and the registered model of this name.

        Raises:
            UserError: it does not.
        """
        client, experiment = connect(f"baklava/{model_name}")
        return cls(client, experiment, f"baklava-{model_name}")

    def begin(self, settings: SearchSettings, out: Path, inputs: Sequence[DatasetInput] = ()) -> str:
        """Create the parent run; returns its id. Raises UserError when the server went down meanwhile."""
        with refused("start it again"):
            self._create(settings, out, inputs, {})
        return self.parent_run

    def resume(self, record: SearchRecord, out: Path, inputs: Sequence[DatasetInput] = ()) -> None:
        """Go on under an earlier parent run, or under a new one where the server has lost it.

        Raises:
            UserError: the server went down meanwhile.
        """
        with refused("start it again"):
            try:
                self._enter(self._found(record.run), out)
            except MissingRunError:
                log(f"mlflow: run {record.run} of this search is not there; its trials are written again, in a new run")
                self._create(record.settings, out, inputs, {REPLACES: record.run})

    def replay(self, records: Sequence[TrialRecord], plan_of: Callable[[Params], BudgetPlan]) -> None:
        """Write the recorded trials that have no child run yet."""
        for record in records:
            self._add(record, _lazily(record, plan_of), record.metrics.get("seconds", 0.0))

    def trial(self, record: TrialRecord, plan: BudgetPlan | None, seconds: float) -> None:
        """Write a finished trial as a child run, once, now or when the server is back."""
        self._add(record, lambda: plan, seconds)

    def flush(self) -> bool:
        """Write what is waiting, if the server answers; returns whether nothing is left."""
        self.writer.submit(self._drain, patient=False).result()
        return not self.pending

    def register(
        self, plan: BudgetPlan, tags: Mapping[str, str], claim: Callable[[CurrentChampion | None], PromotionDecision]
    ) -> RegisteredPlan | None:
        """Register the winner, and move the alias to it if its claim is good; None where MLflow is down."""
        found: list[RegisteredPlan] = []
        if self.flush():
            self._attempt(lambda: found.append(self._register(plan, tags, claim)))
        for registered in found:
            log(f"mlflow: {registered.message}")
        return found[0] if found else None

    def end(
        self,
        metrics: Mapping[str, float],
        files: Sequence[Path],
        status: str = "FINISHED",
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Write what was missed, then close the parent run with its files; `texts` are contents by file name."""
        whole = self.flush()
        if whole:  # else its last words would wait for the server once more
            self.system_metrics.stop()
        if not (whole and self._attempt(lambda: self._close(metrics, files, texts or {}, status))):
            log("mlflow: some of this search is missing there; trials.jsonl and plan.json have all of it")

    def _create(
        self, settings: SearchSettings, out: Path, inputs: Sequence[DatasetInput], more: Mapping[str, str]
    ) -> None:
        own = {"baklava.out": str(out.absolute()), "baklava.kind": "search", "mlflow.source.name": "jobs/search.py"}
        tags = {**own, **{f"baklava.{name}": value for name, value in machine().items()}, **more}
        name = f"{settings.goal.description}, {_few(settings.texts)}, {out.name}"
        self._enter(self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id, out)
        params = [Param(key, str(value)) for key, value in settings.model_dump().items()]
        self.client.log_batch(self.parent_run, params=params)
        self.client.log_inputs(self.parent_run, list(inputs))
        self.client.log_text(self.parent_run, packages(), "requirements.txt")

    def _enter(self, parent: str, out: Path) -> None:
        self.client.update_run(parent, status="RUNNING")
        self.parent_run, self.runs = parent, TrialRuns(self.client, self.experiment, parent, out.name)
        self.system_metrics = Watch(self.client.tracking_uri, parent)
        self.system_metrics.go_on()

    def _found(self, parent: str) -> str:
        """The run itself, else the one that was made to replace it."""
        if self.client.search_runs([self.experiment], f"attributes.run_id = '{parent}'"):
            return parent
        replacing = self.client.search_runs([self.experiment], f"tags.`{REPLACES}` = '{parent}'")
        if not replacing:
            raise MissingRunError
        return str(replacing[0].info.run_id)

    def _add(self, record: TrialRecord, plan: Callable[[], BudgetPlan | None], seconds: float) -> None:
        ended = now()
        self.pending.append(Ended(record, plan, ended - int(1000 * seconds), ended))
        self.writer.submit(self._drain, patient=True)

    def _drain(self, patient: bool) -> None:
        """Write what is waiting, in its order; a server that was just away is not asked again at once if `patient`."""
        if patient and self.failed_at is not None and monotonic() - self.failed_at < RETRY_SECONDS:
            return
        while self.pending and self._attempt(lambda: self._write(self.pending[0])):
            self.pending.popleft()

    def _write(self, trial: Ended) -> None:
        try:
            self.runs.write(trial)
        except WRITE_ERRORS as error:
            if not rejects(error):
                raise
            # Asking again would not help, and all others wait behind it.
            log(f"mlflow: does not take trial {trial.record.trial} ({first_line(error)}); trials.jsonl has it")

    def _attempt(self, write: Callable[[], None]) -> bool:
        try:
            write()
        except WRITE_ERRORS as error:
            if self.failed_at is None:
                log(f"mlflow: cannot write ({first_line(error)}); the search goes on, trials.jsonl has every trial")
            self.failed_at = monotonic()
            return False
        if self.failed_at is not None:
            self.failed_at = None
            self.system_metrics.go_on()
            log("mlflow: the server is back")
        return True

    def _register(
        self, plan: BudgetPlan, tags: Mapping[str, str], claim: Callable[[CurrentChampion | None], PromotionDecision]
    ) -> RegisteredPlan:
        settled = claim(self._holder())
        plan_files(self.client, self.parent_run, plan, "plan/")
        if not self.client.search_registered_models(f"name = '{self.name}'"):
            self.client.create_registered_model(self.name, description="KV-cache budget plans found by baklava")
        source, named = f"runs:/{self.parent_run}/plan", {"tags": dict(tags), "description": settled.reason}
        version = str(self.client.create_model_version(self.name, source, run_id=self.parent_run, **named).version)
        if settled.promoted:
            self.client.set_registered_model_alias(self.name, ALIAS, version)
        return RegisteredPlan(self.name, version, settled)

    def _holder(self) -> CurrentChampion | None:
        found = self.client.search_registered_models(f"name = '{self.name}'")
        version = found[0].aliases.get(ALIAS) if found else None
        if version is None:
            return None
        held = self.client.get_model_version(self.name, version)
        return CurrentChampion(str(version), self._plan_of(str(version)), dict(held.tags))

    def _plan_of(self, version: str) -> BudgetPlan | None:
        address = self.client.get_model_version_download_uri(self.name, version)
        with TemporaryDirectory() as folder:
            try:
                uri = self.client.tracking_uri
                return BudgetPlan.read(download_artifacts(f"{address}/plan.json", dst_path=folder, tracking_uri=uri))
            except (*WRITE_ERRORS, UserError):
                return None

    def _close(
        self, metrics: Mapping[str, float], files: Sequence[Path], texts: Mapping[str, str], status: str
    ) -> None:
        at = now()
        self.client.log_batch(self.parent_run, metrics=[Metric(key, value, at, 0) for key, value in metrics.items()])
        for path in files:
            self.client.log_artifact(self.parent_run, str(path))
        for name, content in texts.items():
            self.client.log_text(self.parent_run, content, name)
        self.client.set_terminated(self.parent_run, status)


class MissingRunError(Exception):
    """The server has no such run."""


def _lazily(record: TrialRecord, plan_of: Callable[[Params], BudgetPlan]) -> Callable[[], BudgetPlan | None]:
    def plan() -> BudgetPlan | None:
        if record.status == "failed":
            return None
        try:
            return plan_of(record.params)
        except UserError:  # what held the plan before a change of version may hold it no more
            return None

    return plan


def _few(texts: Sequence[str]) -> str:
    """The first texts by their last names, and how many more there are."""
    named = " ".join(Path(text).name for text in texts[:2])
    return named + (f" and {len(texts) - 2} more" if len(texts) > 2 else "")
