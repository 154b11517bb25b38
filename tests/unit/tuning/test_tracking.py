"""Facts about what the search writes to MLflow, on a real database and a real server."""

import json
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow_server import MlflowServer
from search_factory import SPACE, record, task

from baklava.data.windows import Splits, Window
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from baklava.plan.registry import explain_tracking_error
from tuning.optimizers.baselines import initial_params
from tuning.search.trial_loop import TrialRecorder
from tuning.selection.promotion import CurrentChampion, PromotionDecision
from tuning.study.journal import Journal
from tuning.study.settings import SearchRecord, SearchSettings
from tuning.study.trial import TrialRecord
from tuning.tracking.tracker import Tracker, dataset_inputs
from tuning.tracking.trial_runs import trial_run_name

SETTINGS = SearchSettings(model="org/Some Model", texts=("t",), budget=0.3, context=10, continuation=2, trials=3)


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("tracking")
        patch.setenv("BAKLAVA_DATA", str(folder))
        yield folder


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[Tracker]:
    tracker = Tracker.connect(SETTINGS.model_name)
    tracker.start(SETTINGS, tmp_path)
    yield tracker
    tracker.system_metrics.stop()


def plan() -> BudgetPlan:
    return task().plan(initial_params(SPACE)[0])


def children(tracker: Tracker) -> list[mlflow.entities.Run]:
    tracker.flush()
    return tracker.client.search_runs([tracker.experiment], f"tags.mlflow.parentRunId = '{tracker.parent_run}'")


def search_record(run: str) -> SearchRecord:
    return SearchRecord(settings=SETTINGS, model=task().profile.model, corpora={"t": "0"}, profile="0", run=run)


@pytest.mark.slow
def test_everything_of_a_model_is_under_the_last_part_of_its_name(tracker: Tracker) -> None:
    assert tracker.name == "baklava-some-model"
    assert tracker.client.get_experiment(tracker.experiment).name == "baklava/some-model"


def test_results_lie_in_the_data_folder(tracker: Tracker, data: Path) -> None:
    tracker.log_trial(record(1, [0.1] * 4), plan(), 1.0)
    assert tracker.flush()
    assert (data / "mlflow.db").exists()
    assert len(list((data / "mlartifacts").rglob("plan.json"))) == 1


def test_a_trial_is_a_child_with_its_curve_over_the_windows(tracker: Tracker) -> None:
    tracker.log_trial(record(7, [0.1, 0.2, 0.3, 0.4]), plan(), seconds=60.0)
    child = children(tracker)[0]
    curve = tracker.client.get_metric_history(child.info.run_id, "window_kl")
    assert [point.value for point in sorted(curve, key=lambda point: point.step)] == [0.1, 0.2, 0.3, 0.4]
    assert child.info.end_time - child.info.start_time == 60_000
    files = [file.path for file in tracker.client.list_artifacts(child.info.run_id)]
    assert sorted(files) == ["budgets.svg", "plan.json"]


def test_the_names_of_runs_begin_with_what_distinguishes_them(tracker: Tracker, tmp_path: Path) -> None:
    chosen = {"allocation": "greedy", "bits": "k4v2", "eviction": "streaming_llm"}
    assert (
        trial_run_name(record(7, [0.1] * 4, ratio=0.125, **chosen), "x")
        == "trial 07, greedy, k4v2, streaming_llm, 12.5%, x"
    )
    assert trial_run_name(record(12, [0.1] * 4, base=7, **chosen), "x").startswith("trial 12 from 07, greedy")
    assert trial_run_name(TrialRecord(trial=3, params={}, metrics={}, status="failed"), "x") == "trial 03, x"
    parent = tracker.client.get_run(tracker.parent_run)
    assert parent.info.run_name == f"{tmp_path.name}: 30% of the bytes, t"


def test_a_parent_shows_the_trials_that_ended_as_a_curve(tracker: Tracker) -> None:
    tracker.log_trial(record(1, [0.3] * 4), plan(), 1.0)
    tracker.log_trial(record(2, [0.2] * 2, "pruned"), plan(), 1.0)
    tracker.log_trial(record(3, [0.1] * 4), plan(), 1.0)
    assert tracker.flush()
    curve = tracker.client.get_metric_history(tracker.parent_run, "trial_kl_geometric")
    assert [(point.step, point.value) for point in curve] == [(1, pytest.approx(0.3)), (3, pytest.approx(0.1))]


def test_the_shifts_of_a_refinement_are_a_file_since_a_parameter_may_not_be_as_long(tracker: Tracker) -> None:
    shifts = [[0.123] * 8] * 200
    tracker.log_trial(record(7, [0.1] * 4, base=1, shifts=shifts), None, 1.0)
    run = children(tracker)[0].info.run_id
    params = tracker.client.get_run(run).data.params
    assert params["base"] == "1"
    assert "shifts" not in params
    assert json.loads(Path(tracker.client.download_artifacts(run, "shifts.json")).read_text()) == shifts


@pytest.mark.parametrize(("status", "shown"), [("finished", "FINISHED"), ("pruned", "FINISHED"), ("failed", "FAILED")])
def test_a_child_shows_how_its_trial_ended(tracker: Tracker, status: str, shown: str) -> None:
    ended = TrialRecord(trial=1, params={}, metrics={}, status=status, error="no room" if status == "failed" else None)
    tracker.log_trial(ended, None, 0.0)
    child = children(tracker)[0]
    assert child.info.status == shown
    assert child.data.tags["baklava.status"] == status
    assert child.data.tags.get("baklava.error") == ended.error


def test_a_trial_that_mlflow_does_not_take_holds_up_no_other(
    tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker.log_trial(record(1, [0.1] * 4, **{"no name?": 1}), None, 1.0)
    tracker.log_trial(record(2, [0.1] * 4), None, 1.0)
    assert tracker.flush()
    assert [run.data.tags["baklava.trial"] for run in children(tracker) if run.info.status == "FINISHED"] == ["2"]
    assert "mlflow: does not accept trial 1" in capsys.readouterr().err


def test_texts_and_windows_are_inputs_by_their_hashes(tmp_path: Path) -> None:
    def windows(*names: str) -> tuple[Window, ...]:
        return tuple(Window(name, f"{name}.txt", (1, 2, 3), 2) for name in names)

    tracker = Tracker.connect(SETTINGS.model_name)
    tracker.start(
        SETTINGS, tmp_path, dataset_inputs({"t": "f" * 64}, Splits(windows("a"), windows("b"), windows("c", "d")))
    )
    tracker.system_metrics.stop()
    found = tracker.client.get_run(tracker.parent_run).inputs.dataset_inputs
    by_name = {each.dataset.name: each for each in found}
    assert by_name.keys() == {"t", "calibration windows", "search windows", "validation windows"}
    assert by_name["t"].dataset.digest == "f" * 32
    assert len({each.dataset.digest for each in found}) == 4
    assert json.loads(by_name["validation windows"].dataset.profile)["documents"] == ["c.txt", "d.txt"]
    assert by_name["search windows"].tags[0].value == "search"


def test_a_parent_has_the_environment_and_the_machine(tracker: Tracker) -> None:
    file = Path(tracker.client.download_artifacts(tracker.parent_run, "requirements.txt"))
    assert f"mlflow=={mlflow.__version__}" in file.read_text().splitlines()
    assert {"baklava.python", "baklava.host", "baklava.gpus"} <= tracker.client.get_run(
        tracker.parent_run
    ).data.tags.keys()


def test_a_parent_has_the_load_of_its_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    tracker = Tracker.connect(SETTINGS.model_name)
    tracker.start(SETTINGS, tmp_path)
    while not (shown := tracker.client.get_run(tracker.parent_run).data.metrics):
        time.sleep(0.1)
    tracker.end({}, [])
    assert any(name.startswith("system/cpu") for name in shown)


def promote(holder: CurrentChampion | None) -> PromotionDecision:
    return PromotionDecision(True, "it is better")


def reject(holder: CurrentChampion | None) -> PromotionDecision:
    return PromotionDecision(False, "it is not")


def test_a_winner_with_a_good_claim_becomes_the_champion(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.client.tracking_uri)
    other = task(budget=0.5).plan(initial_params(SPACE)[0])
    assert tracker.register(other, {"budget": "0.5"}, promote) is not None
    registered = tracker.register(plan(), {"budget": "0.3"}, promote)
    assert registered is not None
    assert registered.uri == "models:/baklava-some-model@champion"
    assert BudgetPlan.read(mlflow.artifacts.download_artifacts(f"{registered.uri}/plan.json")) == plan()
    version = tracker.client.get_model_version_by_alias(tracker.name, "champion")
    assert (version.tags["budget"], version.description) == ("0.3", "it is better")


def test_a_winner_without_one_is_registered_and_leaves_the_alias(
    tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tracker.register(plan(), {"goal": "small"}, promote)
    champions: list[CurrentChampion | None] = []
    second = tracker.register(plan(), {}, lambda holder: champions.append(holder) or reject(holder))
    assert first is not None
    assert second is not None
    assert second.uri == f"models:/{tracker.name}/{second.version}"
    assert str(tracker.client.get_model_version_by_alias(tracker.name, "champion").version) == first.version
    assert champions == [CurrentChampion(first.version, plan(), {"goal": "small"})]
    assert f"version {second.version}, add the alias champion" in capsys.readouterr().err


def test_a_champion_whose_plan_is_gone_is_still_one(tracker: Tracker, data: Path) -> None:
    tracker.register(plan(), {}, promote)
    for file in (data / "mlartifacts").rglob("plan/plan.json"):
        file.unlink()
    champions: list[CurrentChampion | None] = []
    tracker.register(plan(), {}, lambda holder: champions.append(holder) or reject(holder))
    assert champions[0] is not None
    assert champions[0].plan is None


def test_a_parent_run_records_the_settings_and_the_outcome(tracker: Tracker, tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    file.write_text("{}\n")
    tracker.end({"validation_kl": 0.1}, [file], texts={"fidelity.svg": "<svg/>"})
    run = tracker.client.get_run(tracker.parent_run)
    assert (run.info.status, run.data.params["budget"], run.data.metrics["validation_kl"]) == ("FINISHED", "0.3", 0.1)
    files = {file.path for file in tracker.client.list_artifacts(tracker.parent_run)}
    assert files == {"trials.jsonl", "fidelity.svg", "requirements.txt"}


def test_nothing_of_mlflow_travels_with_the_callback(tracker: Tracker, tmp_path: Path) -> None:
    callback = TrialRecorder(Journal(tmp_path / "trials.jsonl"), tracker, None, task(), 3)
    assert callback.__getstate__() == {}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("template") / "template.db"
    MlflowClient(f"sqlite:///{file}").create_experiment("baklava/demo")
    return file


@pytest.fixture
def database(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database that searches have written to, and that MLflow has not opened yet; `MLFLOW_TRACKING_URI` names it."""
    file = tmp_path / "own.db"
    file.write_bytes(template.read_bytes())
    with closing(sqlite3.connect(file)) as connection, connection:
        location = (tmp_path / "artifacts").as_uri()
        connection.execute("UPDATE experiments SET artifact_location = ?", [location])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    return file


def refusal(model: str = "demo") -> str:
    """What a search says that cannot start."""
    with pytest.raises(UserError) as caught:
        Tracker.connect(model)
    return str(caught.value)


def test_a_deleted_experiment_is_refused_with_the_command_that_restores_it(database: Path) -> None:
    client = MlflowClient(f"sqlite:///{database}")
    number = client.get_experiment_by_name("baklava/demo").experiment_id
    client.delete_experiment(number)
    said = refusal()
    assert said.startswith(
        f"the experiment baklava/demo was deleted from the tracking database at sqlite:///{database};"
    )
    assert said.endswith(f"restore it with: mlflow experiments restore -x {number}")
    client.restore_experiment(number)
    Tracker.connect("demo")


def test_the_command_names_the_default_database(tracker: Tracker, data: Path) -> None:
    tracker.client.delete_experiment(tracker.experiment)
    try:
        assert f": MLFLOW_TRACKING_URI=sqlite:///{data}/mlflow.db mlflow experiments restore -x" in refusal(
            "some-model"
        )
    finally:
        tracker.client.restore_experiment(tracker.experiment)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("451aebb31d03", "an older MLflow than the installed .*; back it up, then run: mlflow db upgrade "),
        (
            "ffffffffffff",
            "a newer MLflow than the installed .*; install that version of mlflow, or set MLFLOW_TRACKING",
        ),
    ],
)
def test_a_database_of_another_mlflow_is_refused_with_what_helps(database: Path, version: str, words: str) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", [version])
    assert re.search(words, refusal())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("file:{}?mode=ro&uri=true", "it cannot be written; make the file and its folder writable"),
        ("{}?timeout=0.01", "another process has locked it; wait"),
        ("{}/none/x.db", "not a directory; make it a writable folder"),
        ("/proc/none/x.db", "/proc/none: no such file or directory; make it a writable folder"),
    ],
)
def test_a_database_that_takes_nothing_is_refused(
    database: Path, monkeypatch: pytest.MonkeyPatch, options: str, words: str
) -> None:
    Tracker.connect("demo")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{options.format(database)}")
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        if "timeout" in options:
            other.execute("BEGIN EXCLUSIVE")
        assert words in refusal()


def test_a_full_disk_is_explained() -> None:
    error = MlflowException("(sqlite3.OperationalError) database or disk is full")
    assert explain_tracking_error(error) == (
        "its disk is full",
        "free some space there, or set MLFLOW_TRACKING_URI to another one",
    )


def test_a_file_that_is_no_database_is_refused(database: Path) -> None:
    database.write_text("a text " * 100)
    assert "the file is not a database; restore it from a backup" in refusal()


def test_artifacts_that_cannot_be_written_are_refused_before_the_search(database: Path, tmp_path: Path) -> None:
    Tracker.connect("demo")
    assert list((tmp_path / "artifacts").iterdir()) == []
    (tmp_path / "artifacts").rmdir()
    (tmp_path / "artifacts").touch()
    assert f"files of runs cannot be written to file://{tmp_path}/artifacts (" in refusal()


def test_a_store_whose_library_raises_errors_of_its_own_is_refused_in_one_sentence(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoreError(Exception):
        """As boto3 raises them."""

    def refuse(*_: object, **__: object) -> None:
        raise StoreError("An error occurred (AccessDenied)\nwhen calling PutObject")

    monkeypatch.setattr("tuning.tracking.client.get_artifact_repository", refuse)
    assert refusal().endswith(
        "(An error occurred (AccessDenied)); make it writable, or set MLFLOW_TRACKING_URI to another database or server"
    )


def test_an_error_without_a_file_names_none() -> None:
    assert explain_tracking_error(OSError(28, "No space left on device"))[0] == "its disk is full"
    assert "None" not in explain_tracking_error(ConnectionResetError(104, "Connection reset by peer"))[0]


def test_a_data_folder_that_takes_nothing_is_refused_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAKLAVA_DATA", "/proc/none")
    assert refusal().endswith("(no such file or directory); set BAKLAVA_DATA to a writable folder")


class Refuses(BaseHTTPRequestHandler):
    """A server that answers everything with its status."""

    status = 401

    def answer(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b"You are not authenticated.")

    do_GET = do_POST = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.mark.parametrize(
    ("status", "words"), [(401, "MLFLOW_TRACKING_USERNAME and"), (403, "permission"), (404, "404")]
)
def test_a_server_that_refuses_is_an_error_that_keeps_the_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int, words: str
) -> None:
    monkeypatch.setattr(Refuses, "status", status)
    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{server.server_port}")
        said = refusal()
        server.shutdown()
    assert f"the tracking server at http://***@127.0.0.1:{server.server_port} cannot be used: it " in said
    assert words in said
    assert "secret" not in said + capsys.readouterr().err


def test_a_server_that_is_down_is_refused_without_its_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:1")
    said = refusal()
    assert "it does not answer; start it, correct MLFLOW_TRACKING_URI, or unset it" in said
    assert "secret" not in said + capsys.readouterr().err


def test_a_file_store_which_mlflow_no_longer_writes_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    with pytest.raises(UserError, match="cannot be used"):
        Tracker.connect("demo")


@pytest.fixture(scope="module")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture
def server(running_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    if not running_server.up():
        running_server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running_server.uri)
    return running_server


@pytest.mark.slow
def test_a_server_that_comes_back_gets_what_it_missed_in_order(
    server: MlflowServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker.connect("demo")
    tracker.start(SETTINGS, tmp_path)
    tracker.log_trial(record(1, [0.1] * 4), plan(), 1.0)
    assert tracker.flush()
    server.stop()
    tracker.log_trial(record(2, [0.1] * 4), plan(), 1.0)
    tracker.log_trial(record(3, [0.1] * 4), plan(), 1.0)
    assert not tracker.flush()
    server.start()
    tracker.log_trial(record(4, [0.1] * 4), plan(), 1.0)
    found = children(tracker)
    assert [run.data.tags["baklava.trial"] for run in sorted(found, key=lambda run: run.info.run_name)] == list("1234")
    assert {run.info.status for run in found} == {"FINISHED"}
    assert "mlflow: the server is back" in capsys.readouterr().err
    tracker.end({}, [])
    assert tracker.client.get_run(tracker.parent_run).info.status == "FINISHED"


@pytest.mark.slow
def test_a_server_that_goes_down_loses_nothing_of_a_search_and_warns_once(
    server: MlflowServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker.connect("demo")
    tracker.start(SETTINGS, tmp_path)
    tracker.log_trial(record(1, [0.1] * 4), plan(), 1.0)
    assert len(children(tracker)) == 1
    server.stop()
    for number in (2, 3, 4):
        tracker.log_trial(record(number, [0.1] * 4), plan(), 1.0)
    assert tracker.register(plan(), {}, promote) is None
    assert capsys.readouterr().err.count("cannot write") == 1
    tracker.end({}, [])
    assert "trials.jsonl and plan.json have all of it" in capsys.readouterr().err


class Fails:
    """A client that fails once at one method, after the server did the work if `late`."""

    def __init__(self, client: MlflowClient, method: str, late: bool) -> None:
        self.client, self.method, self.late = client, method, late

    def __getattr__(self, name: str) -> Callable[..., object]:
        found = getattr(self.client, name)
        return self._failing(found) if name == self.method else found

    def _failing(self, method: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object, **named: object) -> object:
            self.method = ""
            if self.late:
                method(*given, **named)
            raise MlflowException("no answer")

        return call


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("method", ["create_run", "log_batch", "log_text", "set_terminated"])
def test_a_request_that_fails_amid_a_trial_loses_and_doubles_nothing(tracker: Tracker, method: str, late: bool) -> None:
    assert children(tracker) == []
    tracker.trial_runs.client = Fails(tracker.client, method, late)
    tracker.log_trial(record(1, [0.1] * 4), plan(), 1.0)
    tracker.writer.submit(int).result()
    assert len(tracker.pending) == 1
    found = children(tracker)
    assert [(run.info.status, run.data.tags["baklava.trial"]) for run in found] == [("FINISHED", "1")]
    assert {file.path for file in tracker.client.list_artifacts(found[0].info.run_id)} == {"plan.json", "budgets.svg"}


def test_a_search_that_goes_on_writes_the_recorded_trials_that_mlflow_lacks(tracker: Tracker, tmp_path: Path) -> None:
    records = [record(number, [0.1] * 4) for number in (1, 2)] + [record(3, [], "failed")]
    tracker.log_trial(records[0], plan(), 1.0)
    half = {"mlflow.parentRunId": tracker.parent_run, "baklava.trial": "2"}
    tracker.client.create_run(tracker.experiment, tags=half)  # what a kill amid a write leaves
    assert tracker.flush()
    again = Tracker.connect(SETTINGS.model_name)
    again.resume(search_record(tracker.parent_run), tmp_path)
    again.replay(records, task().plan)
    again.replay(records, task().plan)
    found = children(again)
    assert sorted(run.data.tags["baklava.trial"] for run in found) == ["1", "2", "3"]
    assert all(run.info.end_time for run in found)
    again.system_metrics.stop()


def test_a_search_whose_run_was_lost_goes_on_in_one_new_run(tracker: Tracker, tmp_path: Path) -> None:
    record_of_it = search_record(tracker.parent_run)
    tracker.client.delete_run(tracker.parent_run)
    found = []
    for _ in range(2):
        again = Tracker.connect(SETTINGS.model_name)
        again.resume(record_of_it, tmp_path)
        again.replay([record(1, [0.1] * 4)], task().plan)
        assert len(children(again)) == 1
        again.system_metrics.stop()
        found.append(again.parent_run)
    assert found[0] == found[1] != tracker.parent_run
