"""A search in MLflow: a parent run with its context, a child run per trial, and the winner as a registered version."""

import hashlib
import json
import logging
import platform
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Self

import torch
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from baklava.console import log
from baklava.data.windows import Splits, Window
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from baklava.plan.registry import download_plan, error_summary
from tuning.selection.promotion import ALIAS, CurrentChampion, PromotionDecision, RegisteredPlan
from tuning.study.settings import SearchRecord, SearchSettings
from tuning.study.trial import TrialRecord
from tuning.tracking.client import (
    TRACKING_ERRORS,
    connect,
    is_invalid_parameter,
    now_ms,
    source_tags,
    tracking_errors_as_user_errors,
)
from tuning.tracking.trial_runs import FinishedTrial, TrialRunWriter, log_plan

RETRY_INTERVAL_SECONDS = 15.0
"""Between two attempts to reach a server that was down."""

REPLACES_TAG = "baklava.replaces"
"""Tag of a parent run that replaces one that the server has lost: the id of the lost run."""

Params = dict[str, object]
DecidePromotion = Callable[[CurrentChampion | None], PromotionDecision]


class Tracker:
    """Writes a search to MLflow through its own client, without MLflow's global state.

    A thread writes the trials, so that no trial waits for the server. If the server goes down, nothing is lost: pending
    trials are written when it is back, `trials.jsonl` has every trial, and `replay` writes those that a kill prevented.
    """

    def __init__(self, client: MlflowClient, experiment: str, name: str) -> None:
        self.client, self.experiment, self.name = client, experiment, name
        self.parent_run = ""
        self.system_metrics = SystemMetrics(client.tracking_uri, "")
        self.trial_runs = TrialRunWriter(client, experiment, "", "")
        self.pending: deque[FinishedTrial] = deque()
        self.failed_at: float | None = None
        self.writer = ThreadPoolExecutor(1, "mlflow")
        self.writing = Lock()  # an interrupt while the executor starts its thread lets it start a second one

    @classmethod
    def connect(cls, model_name: str) -> Self:
        """Return a tracker for the experiment and the registered model of this name.

        Raises:
            UserError: the server does not answer or refuses something, or the experiment was deleted.
        """
        client, experiment = connect(f"baklava/{model_name}")
        tracker = cls(client, experiment, f"baklava-{model_name}")
        with tracking_errors_as_user_errors():
            tracker._is_registered()
        return tracker

    def start(self, settings: SearchSettings, out: Path, inputs: Sequence[DatasetInput] = ()) -> str:
        """Create the parent run and return its id; raise UserError if the server has gone down."""
        with tracking_errors_as_user_errors():
            self._create_parent_run(settings, out, inputs, {})
        return self.parent_run

    def resume(self, record: SearchRecord, out: Path, inputs: Sequence[DatasetInput] = ()) -> None:
        """Continue the parent run of a search, or create a new one if the server has lost it.

        Raises:
            UserError: the server has gone down.
        """
        with tracking_errors_as_user_errors():
            parent = self._find_parent_run(record.run)
            if parent is not None:
                self._use_parent_run(parent, out)
            else:
                log(f"mlflow: run {record.run} of this search is missing; its trials are written to a new run")
                self._create_parent_run(record.settings, out, inputs, {REPLACES_TAG: record.run})

    def replay(self, records: Sequence[TrialRecord], make_plan: Callable[[Params], BudgetPlan]) -> None:
        """Write the recorded trials that have no child run yet."""
        for record in records:

            def plan(record: TrialRecord = record) -> BudgetPlan | None:
                try:
                    return None if record.status == "failed" else make_plan(record.params)
                except UserError:  # an older version may have made plans that this one does not
                    return None

            self._enqueue(record, plan, record.metrics.get("seconds", 0.0))

    def log_trial(self, record: TrialRecord, plan: BudgetPlan | None, seconds: float) -> None:
        """Write a trial that just ended as a child run, once, now or when the server is back."""
        self._enqueue(record, lambda: plan, seconds)

    def flush(self) -> bool:
        """Write the pending trials if the server answers; return whether none is left."""
        self.writer.submit(self._write_pending, throttled=False).result()
        return not self.pending

    def register(self, plan: BudgetPlan, tags: Mapping[str, str], decide: DecidePromotion) -> RegisteredPlan | None:
        """Register the winner, and move the alias to it if `decide` says so; return None if MLflow is down."""
        registered: list[RegisteredPlan] = []
        if self.flush():
            self._attempt(lambda: registered.append(self._register(plan, tags, decide)))
        if not registered:
            return None
        log(f"mlflow: {registered[0].message}")
        return registered[0]

    def end(
        self,
        metrics: Mapping[str, float],
        files: Sequence[Path],
        status: str = "FINISHED",
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Write what is pending, then end the parent run with its files; `texts` are contents by file name."""
        complete = self.flush()
        if complete:  # otherwise its last samples would wait for the server again
            self.system_metrics.stop()
        if not (complete and self._attempt(lambda: self._end_parent_run(metrics, files, texts or {}, status))):
            log("mlflow: some of this search is missing there; trials.jsonl and plan.json have all of it")

    def _create_parent_run(
        self, settings: SearchSettings, out: Path, inputs: Sequence[DatasetInput], more_tags: Mapping[str, str]
    ) -> None:
        tags = {"baklava.out": str(out.absolute()), "baklava.kind": "search", **source_tags("baklava-search")}
        tags |= {**machine_tags(), **more_tags}
        texts = " ".join(Path(text).name for text in settings.texts[:2])
        if len(settings.texts) > 2:
            texts += f" and {len(settings.texts) - 2} more"
        # The folder comes first: in a list of runs MLflow shows some twenty characters.
        name = f"{out.name}: {settings.goal.description}, {texts}"
        self._use_parent_run(self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id, out)
        params = [Param(key, str(value)) for key, value in settings.model_dump().items()]
        self.client.log_batch(self.parent_run, params=params)
        self.client.log_inputs(self.parent_run, list(inputs))
        self.client.log_text(self.parent_run, installed_packages(), "requirements.txt")

    def _use_parent_run(self, parent: str, out: Path) -> None:
        self.client.update_run(parent, status="RUNNING")
        self.parent_run = parent
        self.trial_runs = TrialRunWriter(self.client, self.experiment, parent, out.name)
        self.system_metrics = SystemMetrics(self.client.tracking_uri, parent)
        self.system_metrics.restart()

    def _find_parent_run(self, parent: str) -> str | None:
        """The run itself, or the one that replaced it; None if the server has neither."""
        if self.client.search_runs([self.experiment], f"attributes.run_id = '{parent}'"):
            return parent
        replacements = self.client.search_runs([self.experiment], f"tags.`{REPLACES_TAG}` = '{parent}'")
        return str(replacements[0].info.run_id) if replacements else None

    def _enqueue(self, record: TrialRecord, make_plan: Callable[[], BudgetPlan | None], seconds: float) -> None:
        ended_ms = now_ms()
        self.pending.append(FinishedTrial(record, make_plan, ended_ms - int(1000 * seconds), ended_ms))
        self.writer.submit(self._write_pending, throttled=True)

    def _write_pending(self, throttled: bool) -> None:
        """Write pending trials in order; if `throttled`, leave a server alone that failed a moment ago."""
        if throttled and self.failed_at is not None and monotonic() - self.failed_at < RETRY_INTERVAL_SECONDS:
            return
        with self.writing:
            while self.pending and self._attempt(lambda: self._write(self.pending[0])):
                self.pending.popleft()

    def _write(self, trial: FinishedTrial) -> None:
        try:
            self.trial_runs.write(trial)
        except TRACKING_ERRORS as error:
            if not is_invalid_parameter(error):
                raise
            # A retry would not help, and all other trials would wait for it.
            log(f"mlflow: does not accept trial {trial.record.trial} ({error_summary(error)}); trials.jsonl has it")

    def _attempt(self, write: Callable[[], None]) -> bool:
        """Write something; return whether the server took it, and log when it goes down and comes back."""
        try:
            write()
        except TRACKING_ERRORS as error:
            if self.failed_at is None:
                log(
                    f"mlflow: cannot write ({error_summary(error)}); the search continues, trials.jsonl has every trial"
                )
            self.failed_at = monotonic()
            return False
        if self.failed_at is not None:
            self.failed_at = None
            self.system_metrics.restart()
            log("mlflow: the server is back")
        return True

    def _register(self, plan: BudgetPlan, tags: Mapping[str, str], decide: DecidePromotion) -> RegisteredPlan:
        decision = decide(self._current_champion())
        log_plan(self.client, self.parent_run, plan, "plan/")
        if not self._is_registered():
            self.client.create_registered_model(self.name, description="KV-cache budget plans found by baklava")
        version = self.client.create_model_version(
            self.name,
            f"runs:/{self.parent_run}/plan",
            run_id=self.parent_run,
            tags=dict(tags),
            description=decision.reason,
        ).version
        if decision.promoted:
            self.client.set_registered_model_alias(self.name, ALIAS, str(version))
        return RegisteredPlan(self.name, str(version), decision)

    def _is_registered(self) -> bool:
        return bool(self.client.search_registered_models(f"name = '{self.name}'"))

    def _current_champion(self) -> CurrentChampion | None:
        models = self.client.search_registered_models(f"name = '{self.name}'")
        version = models[0].aliases.get(ALIAS) if models else None
        if version is None:
            return None
        tags = dict(self.client.get_model_version(self.name, version).tags)
        try:
            plan = download_plan(self.client, self.name, str(version))
        except (*TRACKING_ERRORS, UserError):
            plan = None
        return CurrentChampion(str(version), plan, tags)

    def _end_parent_run(
        self, metrics: Mapping[str, float], files: Sequence[Path], texts: Mapping[str, str], status: str
    ) -> None:
        at = now_ms()
        self.client.log_batch(self.parent_run, metrics=[Metric(name, value, at, 0) for name, value in metrics.items()])
        for path in files:
            self.client.log_artifact(self.parent_run, str(path))
        for name, content in texts.items():
            self.client.log_text(self.parent_run, content, name)
        self.client.set_terminated(self.parent_run, status)


MAX_DIGEST_CHARACTERS = 32
"""Of a data set's hash: MLflow accepts 36."""

MAX_DATASET_NAME_CHARACTERS = 500


def installed_packages() -> str:
    """Return every installed package with its version in the format of `pip freeze`, without the checkout itself."""
    versions = {dist.name: dist.version for dist in distributions() if dist.name not in (None, "baklava")}
    return "".join(f"{name}=={versions[name]}\n" for name in sorted(versions, key=str.lower))


def machine_tags() -> dict[str, str]:
    """Return Python, system and GPUs of the machine that drives the search, as tags."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "baklava.python": platform.python_version(),
        "baklava.system": platform.platform(),
        "baklava.host": platform.node(),
        "baklava.gpus": ", ".join(gpus) or "none",
    }


class SystemMetrics:
    """MLflow's thread that samples the machine's load; it dies if the server is away once, and `restart` revives it.

    It samples every ten seconds, or every `$MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL`.
    """

    def __init__(self, uri: str, run: str) -> None:
        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)  # the tracker warns once
        self.uri, self.run = uri, run
        self.monitor: SystemMetricsMonitor | None = None

    def restart(self) -> None:
        """Start sampling, unless the thread runs."""
        if self.monitor is None or not self.monitor._process or not self.monitor._process.is_alive():
            self.monitor = SystemMetricsMonitor(self.run, resume_logging=True, tracking_uri=self.uri)
            self.monitor.start()

    def stop(self) -> None:
        """Stop sampling, and write the last samples."""
        if self.monitor is not None:
            self.monitor.finish()


def dataset_inputs(corpora: Mapping[str, str], splits: Splits) -> list[DatasetInput]:
    """Return MLflow's inputs of a search: every text, and the windows of every split, each with its digest.

    Args:
        corpora: The digest of each text by its name.
        splits: The windows.
    """
    texts = [_dataset_input(name, digest, "text", {"text": name}, {}) for name, digest in corpora.items()]
    windows_of = {"calibration": splits.calibration, "search": splits.search, "validation": splits.validation}
    source = {"texts": sorted(corpora)}
    return texts + [
        _dataset_input(f"{split} windows", windows_digest(windows), split, source, _windows_profile(windows))
        for split, windows in windows_of.items()
    ]


def windows_digest(windows: Sequence[Window]) -> str:
    """Return a hash of the windows' token ids and of where their continuations begin."""
    content = [[window.name, window.context_length, *window.ids] for window in windows]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _windows_profile(windows: Sequence[Window]) -> dict[str, object]:
    return {
        "windows": len(windows),
        "tokens": sum(len(window.ids) for window in windows),
        "documents": sorted({window.document for window in windows}),
    }


def _dataset_input(
    name: str, digest: str, context: str, source: Mapping[str, object], profile: Mapping[str, object]
) -> DatasetInput:
    dataset = Dataset(
        name=name[-MAX_DATASET_NAME_CHARACTERS:],
        digest=digest[:MAX_DIGEST_CHARACTERS],
        source_type="texts",
        source=json.dumps(source),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
