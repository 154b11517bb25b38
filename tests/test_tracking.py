"""Facts about what the search writes to MLflow, on a real database and a real server."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import mlflow
import pytest
from mlflow import MlflowClient
from searching import descendants, kill
from test_space import SPACE, record, task

from baklava.errors import UserError
from baklava.plan import BudgetPlan
from tuning.heuristics import first_params
from tuning.journal import Journal
from tuning.recorder import Recorder
from tuning.settings import SearchSettings
from tuning.tracking import Tracker
from tuning.trials import TrialRecord

SETTINGS = SearchSettings(model="org/Some Model", texts=("t",), budget=0.3, context=10, continuation=2, trials=3)


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("tracking")
        patch.setenv("BAKLAVA_DATA", str(folder))
        yield folder


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    tracker = Tracker.connect(SETTINGS.model_name)
    tracker.begin(SETTINGS, tmp_path)
    return tracker


def plan() -> BudgetPlan:
    return task().plan(first_params(SPACE)[0])


def children(tracker: Tracker) -> list[mlflow.entities.Run]:
    return tracker.client.search_runs([tracker.experiment], f"tags.mlflow.parentRunId = '{tracker.parent}'")


def test_everything_of_a_model_is_under_the_last_part_of_its_name(tracker: Tracker) -> None:
    assert tracker.name == "baklava-some-model"
    assert tracker.client.get_experiment(tracker.experiment).name == "baklava/some-model"


def test_results_lie_in_the_data_folder(tracker: Tracker, data: Path) -> None:
    tracker.trial(record(1, [0.1] * 4), plan(), 1.0)
    assert (data / "mlflow.db").exists()
    assert len(list((data / "mlartifacts").rglob("plan.json"))) == 1


def test_a_trial_is_a_child_with_its_curve_over_the_windows(tracker: Tracker) -> None:
    tracker.trial(record(7, [0.1, 0.2, 0.3, 0.4]), plan(), seconds=60.0)
    child = children(tracker)[0]
    curve = tracker.client.get_metric_history(child.info.run_id, "window_kl")
    assert [point.value for point in sorted(curve, key=lambda point: point.step)] == [0.1, 0.2, 0.3, 0.4]
    assert child.info.end_time - child.info.start_time == 60_000
    assert child.info.run_name == "trial 7"


def test_the_shifts_of_a_refinement_are_a_file_since_a_parameter_may_not_be_as_long(tracker: Tracker) -> None:
    shifts = [[0.123] * 8] * 200
    tracker.trial(record(7, [0.1] * 4, base=1, shifts=shifts), None, 1.0)
    run = children(tracker)[0].info.run_id
    params = tracker.client.get_run(run).data.params
    assert params["base"] == "1"
    assert "shifts" not in params
    assert json.loads(Path(tracker.client.download_artifacts(run, "shifts.json")).read_text()) == shifts


@pytest.mark.parametrize(("status", "shown"), [("finished", "FINISHED"), ("pruned", "FINISHED"), ("failed", "FAILED")])
def test_a_child_shows_how_its_trial_ended(tracker: Tracker, status: str, shown: str) -> None:
    ended = TrialRecord(trial=1, params={}, metrics={}, status=status, error="no room" if status == "failed" else None)
    tracker.trial(ended, None, 0.0)
    child = children(tracker)[0]
    assert child.info.status == shown
    assert child.data.tags["baklava.status"] == status
    assert child.data.tags.get("baklava.error") == ended.error


def test_the_champion_is_the_plan_of_the_latest_search(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.client.tracking_uri)
    other = task(budget=0.5).plan(first_params(SPACE)[0])
    assert tracker.champion(other, {"budget": "0.5"}) == "models:/baklava-some-model@champion"
    uri = tracker.champion(plan(), {"budget": "0.3"})
    assert BudgetPlan.read(mlflow.artifacts.download_artifacts(f"{uri}/plan.json")) == plan()
    version = tracker.client.get_model_version_by_alias(tracker.name, "champion")
    assert version.tags["budget"] == "0.3"


def test_a_parent_run_tells_what_was_asked_and_how_it_ended(tracker: Tracker, tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    file.write_text("{}\n")
    tracker.end({"validation_kl": 0.1}, [file])
    run = tracker.client.get_run(tracker.parent)
    assert (run.info.status, run.data.params["budget"], run.data.metrics["validation_kl"]) == ("FINISHED", "0.3", 0.1)
    assert [file.path for file in tracker.client.list_artifacts(tracker.parent)] == ["trials.jsonl"]


def test_nothing_of_mlflow_travels_with_the_callback(tracker: Tracker, tmp_path: Path) -> None:
    callback = Recorder(Journal(tmp_path / "trials.jsonl"), tracker, None, task(), 3)
    assert callback.__getstate__() == {}


def test_a_file_store_which_mlflow_no_longer_writes_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    with pytest.raises(UserError, match="cannot be used"):
        Tracker.connect("demo")


class Server:
    """`mlflow server` as a process."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", port))
            self.port = free.getsockname()[1]
        store = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "a")]
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port), *store]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.uri = f"http://127.0.0.1:{self.port}"

    def up(self) -> bool:
        try:
            return httpx.get(f"{self.uri}/health", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        for pid in [pid for pid, _ in descendants(self.process.pid)] + [self.process.pid]:
            kill(pid)
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(tmp_path)
    while not server.up():
        assert server.process.poll() is None
        time.sleep(0.2)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    server.stop()


def test_a_server_that_goes_down_loses_nothing_of_a_search_and_warns_once(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker.connect("demo")
    tracker.begin(SETTINGS, tmp_path)
    tracker.trial(record(1, [0.1] * 4), plan(), 1.0)
    assert len(children(tracker)) == 1
    server.stop()
    for number in (2, 3, 4):
        tracker.trial(record(number, [0.1] * 4), plan(), 1.0)
    assert tracker.champion(plan(), {}) is None
    assert capsys.readouterr().err.count("cannot write") == 1
    tracker.end({}, [])
    assert "trials.jsonl and plan.json have all of it" in capsys.readouterr().err


def test_what_could_not_be_written_is_written_at_the_end(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as down:
        down.setattr(tracker, "client", MlflowClient(tracking_uri="http://127.0.0.1:9"))
        tracker.trial(record(1, [0.1] * 4), plan(), 1.0)
        tracker.trial(record(2, [0.1] * 4), plan(), 1.0)
    assert children(tracker) == []
    tracker.end({}, [])
    assert len(children(tracker)) == 2
    assert tracker.client.get_run(tracker.parent).info.status == "FINISHED"
