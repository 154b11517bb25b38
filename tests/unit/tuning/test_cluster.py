"""Facts about clusters: the search as a job on a real Ray head with a token, and cluster files that Ray accepts."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from ray_head import Head, Loopback
from search_process import ROOT, SMALL_SEARCH_OPTIONS, count_lines, make_model, make_texts

from baklava.plan.budget_plan import BudgetPlan
from tuning.search.cli import build_parser

FILES = ("cluster.yaml", "cluster.local.yaml")


@pytest.fixture(params=FILES)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load((ROOT / request.param).read_text())


def test_ray_accepts_the_cluster_file(config: dict[str, Any]) -> None:
    validate_config(prepare_config(config))


def test_ray_would_not_accept_a_misspelt_cluster_file(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="max_wokers"):
        validate_config(prepare_config({**config, "max_wokers": 3}))


def test_a_cluster_of_ones_own_machines_has_a_worker_on_each() -> None:
    config = prepare_config(yaml.safe_load((ROOT / "cluster.local.yaml").read_text()))
    nodes = config["available_node_types"]["local.cluster.node"]
    assert nodes["min_workers"] == nodes["max_workers"] == len(config["provider"]["worker_ips"]) > 0


def test_every_node_gets_the_token_and_starts_with_it(config: dict[str, Any]) -> None:
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    for where in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[where] if "ray start" in command]
        assert len(starts) == 1
        before, _, _ = starts[0].partition("ray start")
        assert "export " in before
        assert "RAY_AUTH_MODE=token" in before


def test_the_dashboard_stays_on_the_head(config: dict[str, Any]) -> None:
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


def test_the_cluster_file_uploads_neither_results_nor_environments(config: dict[str, Any]) -> None:
    assert {".git", ".venv", "runs"} <= set(config["rsync_exclude"])


def test_the_page_on_clusters_names_options_and_files_that_there_are() -> None:
    page = (ROOT / "docs/guide/cluster.md").read_text()
    commands = [line.partition("jobs/search.py ")[2] for line in page.splitlines() if "jobs/search.py --" in line]
    known = {option for action in build_parser()._actions for option in action.option_strings}
    assert commands
    assert {word for command in commands for word in command.split() if word.startswith("--")} <= known
    assert all((ROOT / name).exists() for name in re.findall(r"`([\w./-]+\.(?:yaml|py|md))`", page))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    # Ray's sockets lie in its folder, and their paths may have 107 characters only.
    network = Loopback()
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as temp:
        head = Head(tmp_path_factory.mktemp("head"), temp, network)
        try:
            head.wait()
            yield head
        finally:
            head.stop()
            network.stop()


@pytest.fixture(scope="module")
def searched(head: Head, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    root = tmp_path_factory.mktemp("job")
    named = ["--model", make_model(root / "model"), "--texts", make_texts(root / "texts")]
    ended = head.job("jobs/search.py", *named, *SMALL_SEARCH_OPTIONS, "--trials", 3, "--replicas", 1)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended


@pytest.mark.ray
def test_a_job_leaves_its_results_where_ray_does_not_delete_them(
    head: Head, searched: subprocess.CompletedProcess[str]
) -> None:
    plan = next(Path(head.env["BAKLAVA_DATA"]).glob("runs/*/plan.json"))
    assert str(plan) in searched.stdout
    assert BudgetPlan.read(plan).ratio <= 0.5
    assert count_lines(plan.with_name("trials.jsonl")) == 3


@pytest.mark.ray
def test_the_log_of_a_job_can_be_read(head: Head, searched: subprocess.CompletedProcess[str]) -> None:
    log = head.job_log()
    assert "connecting to" in log
    assert "trial 3 of 3" in log
    assert "winner: " in log
    assert not re.findall("[\x00-\x08\x0b-\x1f]", log)  # neither colours nor bars that are drawn again and again
    assert "it/s]" not in log
    assert max(map(len, log.splitlines())) < 600


@pytest.mark.ray
def test_a_job_that_fails_says_so_to_who_submitted_it(head: Head, tmp_path: Path) -> None:
    ended = head.job("jobs/search.py", "--json", "/nowhere/at/all.json", "--out", tmp_path / "none")
    assert ended.returncode != 0
    assert "give a file in a folder that exists" in ended.stdout + ended.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.ray
def test_a_job_without_the_token_is_turned_away(head: Head) -> None:
    ended = head.job("jobs/search.py", "--help", token="c" * 64)
    assert ended.returncode != 0
    assert "usage: baklava-search" not in ended.stdout


def test_importing_the_search_sets_no_environment_variable_and_its_command_line_keeps_those_that_are_set() -> None:
    code = """
import os
before = dict(os.environ)
import tuning, tuning.search.cli, tuning.evaluation.cli, sys
assert dict(os.environ) == before and not {"ray", "mlflow"} & sys.modules.keys()
tuning.configure_environment()
print(os.environ["RAY_AUTH_MODE"], os.environ["TUNE_DISABLE_SIGINT_HANDLER"], os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
"""
    names = ("RAY_AUTH_MODE", "TUNE_DISABLE_SIGINT_HANDLER")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "3"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.split() == ["token", "1", "3"], ran.stderr
