import json
import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from baklava.errors import UserError
from baklava.plan.budget_plan import full_cache_plan
from baklava.plan.registry import load_plan
from baklava.runtime.ray_session import check_answers
from serve_app.api.network import check_listen_address, read_api_keys
from serve_app.openai.errors import error_summary


@pytest.fixture(scope="module")
def plan(tiny):
    loaded = tiny()
    return full_cache_plan(loaded.identity, loaded.geometry, 64)


@pytest.fixture(scope="module")
def registry(plan, tmp_path_factory):
    """The address of a tracking database with two versions of a registered plan, the first one the champion."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(uri, uri)
    experiment = client.create_experiment("plans", artifact_location=folder.as_uri())
    client.create_registered_model("rivers")
    for length in (64, 32):
        run = client.create_run(experiment).info.run_id
        content = plan.model_copy(update={"context_length": length}).model_dump(mode="json")
        client.log_dict(run, content, "plan/plan.json")
        client.create_model_version("rivers", source=f"runs:/{run}/plan", run_id=run)
    client.set_registered_model_alias("rivers", "champion", "1")
    return uri


@pytest.mark.slow
def test_a_registered_plan_is_found_by_alias_and_by_version(registry, plan, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    assert load_plan("models:/rivers@champion") == plan
    assert load_plan("models:/rivers/2").context_length == 32


def test_the_registry_in_the_data_folder_is_the_default_and_no_other_is_made(registry, plan, monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("BAKLAVA_DATA", str(Path(registry.removeprefix("sqlite:///")).parent))
    monkeypatch.chdir(tmp_path)
    assert load_plan("models:/rivers@champion") == plan
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("models:/lakes@champion", "'lakes'.*has rivers"),
        ("models:/rivers@best", "'best'.*has champion"),
        ("models:/rivers", "NAME@ALIAS"),
        ("models:/rivers/7", "no version is named '7'; the registered plan rivers has 1, 2"),
        ("models:/ri/vers@champion", "'ri/vers'.*has rivers"),
        ("models:/@champion", "''"),
    ],
)
def test_an_unknown_registered_plan_is_rejected_with_the_known_ones(registry, source, words, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    with pytest.raises(UserError, match=words):
        load_plan(source)


@pytest.fixture
def copied(registry, monkeypatch, tmp_path):
    """A copy of the registry's database, and a client of it."""
    database = tmp_path / "mlflow.db"
    database.write_bytes(Path(registry.removeprefix("sqlite:///")).read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    return database


def edit(database, *statement):
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(*statement)


def test_an_empty_registry_names_the_command_that_fills_it(copied):
    uri = f"sqlite:///{copied}"
    MlflowClient(uri, uri).delete_registered_model("rivers")
    with pytest.raises(UserError, match=r"has none; register one with baklava-search .*make search"):
        load_plan("models:/rivers@champion")


def test_a_registry_is_read_to_its_last_page(copied, plan):
    uri = f"sqlite:///{copied}"
    client = MlflowClient(uri, uri)
    for number in range(100):
        client.create_registered_model(f"lake-{number:03}")
    assert load_plan("models:/rivers@champion") == plan
    with pytest.raises(UserError, match=r"has lake-000, .* and 81 more"):
        load_plan("models:/sea@champion")


@pytest.mark.parametrize(
    ("version", "words"),
    [("451aebb31d03", "back it up, then run: mlflow db upgrade"), ("ffffffffffff", "install that version of mlflow")],
)
def test_a_registry_of_another_mlflow_is_an_error_with_what_helps(copied, capfd, version, words):
    edit(copied, "UPDATE alembic_version SET version_num = ?", [version])
    with pytest.raises(UserError, match=f"cannot fetch models:/rivers@champion from .*{words}.*or give a plan file"):
        load_plan("models:/rivers@champion")
    assert capfd.readouterr().err == ""


def test_a_version_whose_registration_failed_is_an_error(copied):
    edit(copied, "UPDATE model_versions SET status = 'FAILED_REGISTRATION' WHERE version = 2")
    with pytest.raises(UserError, match=r"version 2 of rivers is FAILED_REGISTRATION.*choose another version"):
        load_plan("models:/rivers/2")


def test_a_version_whose_files_were_removed_is_an_error(copied, tmp_path):
    edit(copied, "UPDATE model_versions SET storage_location = ?, source = ?", [f"{tmp_path}/gone", f"{tmp_path}/gone"])
    with pytest.raises(UserError, match=r"version 2 of rivers has no plan.json any more at .*gone; choose another"):
        load_plan("models:/rivers/2")


def test_a_registry_without_tables_or_with_other_content_is_an_error(copied):
    copied.write_text("a text " * 100)
    with pytest.raises(UserError, match="the file is not a database; restore it from a backup"):
        load_plan("models:/rivers@champion")


def test_the_error_of_a_registry_keeps_its_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:1")
    with pytest.raises(UserError, match="it does not answer; start it") as caught:
        load_plan("models:/rivers@champion")
    assert "secret" not in str(caught.value)


def test_a_tracking_server_that_is_down_is_an_error(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(UserError, match="cannot fetch"):
            load_plan("models:/rivers@champion")


def test_no_empty_database_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(UserError, match="register one with baklava-search"):
        load_plan("models:/rivers@champion")
    assert not list(tmp_path.iterdir())


def test_an_error_is_summarized_by_its_first_line_or_its_type():
    assert error_summary(ValueError("a\nb")) == "a"
    assert error_summary(ValueError()) == error_summary(ValueError("\n")) == "ValueError"


def test_a_file_is_read(plan, tmp_path):
    plan.write(tmp_path / "plan.json")
    assert load_plan(str(tmp_path / "plan.json")) == plan
    (tmp_path / "plan.json").write_text(json.dumps({"schema_version": 9}))
    with pytest.raises(UserError, match="not a valid plan"):
        load_plan(str(tmp_path / "plan.json"))


def test_keys_come_from_a_file_or_else_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("BAKLAVA_API_KEYS", "one, two,")
    assert read_api_keys(None) == ["one", "two"]
    file = tmp_path / "keys"
    file.write_text("three\n\nfour\n")
    assert read_api_keys(file) == ["three", "four"]
    file.write_text("\n")
    with pytest.raises(UserError, match="no keys"):
        read_api_keys(file)
    with pytest.raises(UserError, match="cannot read"):
        read_api_keys(tmp_path / "none")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_open_address_without_keys_is_rejected(host):
    with pytest.raises(UserError, match="API keys"):
        check_listen_address(host, 8000, has_keys=False)


def test_a_port_in_use_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}.*in use"):
            check_listen_address("127.0.0.1", port, has_keys=False)
    check_listen_address("127.0.0.1", port, has_keys=False)


def test_an_invalid_host_is_an_error():
    with pytest.raises(UserError, match="not an address"):
        check_listen_address("no.such.host.invalid", 8000, has_keys=True)


def test_a_cluster_that_does_not_answer_is_an_error_at_once():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="no Ray cluster answers"):
            check_answers(f"127.0.0.1:{closed.getsockname()[1]}")
    check_answers("auto")
