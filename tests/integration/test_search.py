"""Facts about a search from end to end, on a tiny model: what it leaves behind, what it survives, what it refuses."""

import json
import os
import signal
import socket
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from model_families import FAMILIES
from search_process import (
    SMALL_SEARCH_OPTIONS,
    count_lines,
    descendants,
    kill,
    make_model,
    make_texts,
    start_search,
    wait_until,
)

from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import load
from baklava.runtime.ray_session import ray_session
from tuning.search.cli import main
from tuning.study.journal import Journal
from tuning.study.settings import SearchRecord
from tuning.study.trial import TRIALS_FILE, TrialRecord
from tuning.workers.cluster import OBJECT_STORE_BYTES

TRIALS = 10


@dataclass(frozen=True)
class Place:
    """Where the tests' model, texts and results are."""

    root: Path

    @property
    def usual(self) -> list[str]:
        """The arguments that all searches here share."""
        return [
            "--model",
            str(self.root / "model"),
            "--texts",
            str(self.root / "texts"),
            *SMALL_SEARCH_OPTIONS,
            "--trials",
            str(TRIALS),
        ]

    @property
    def half(self) -> list[str]:
        """The usual arguments, at half of the bytes."""
        return [*self.usual, "--budget", "0.5"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("search")
    make_model(root / "model")
    make_texts(root / "texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKLAVA_CACHE", str(root / "cache"))
        patch.setenv("BAKLAVA_DATA", str(root / "data"))
        yield Place(root)


@dataclass(frozen=True)
class Finished:
    """A search that ended, although one of its two replicas was killed amid its trials."""

    out: Path
    log: str
    summary: dict[str, Any]

    @property
    def plan(self) -> BudgetPlan:
        return BudgetPlan.read(self.out / "plan.json")

    @property
    def journal(self) -> list[Any]:
        return Journal.open(self.out / TRIALS_FILE, TrialRecord.model_validate_json).records


@pytest.fixture(scope="module")
def finished(place: Place) -> Finished:
    out, log, summary = place.root / "run", place.root / "run.log", place.root / "run.json"
    process = start_search(*place.half, "--replicas", 2, "--out", out, "--json", summary, log=log)
    wait_until(lambda: count_lines(out / "trials.jsonl") >= 2, process, log)
    replicas = [pid for pid, title in descendants(process.pid) if title.startswith("ray::ScoringWorker")]
    assert len(replicas) == 2
    kill(replicas[0])
    assert process.wait(timeout=300) == 0, log.read_text()
    return Finished(out, log.read_text(), json.loads(summary.read_text()))


@pytest.mark.ray
def test_a_search_ends_with_all_its_trials_though_a_replica_was_killed(finished: Finished) -> None:
    assert "died; its work goes to the others" in finished.log
    assert [record.trial for record in finished.journal] == list(range(1, TRIALS + 1))
    assert {record.status for record in finished.journal} <= {"finished", "pruned"}


@pytest.mark.ray
def test_every_line_of_the_journal_has_what_other_scripts_read(finished: Finished) -> None:
    for line in (finished.out / "trials.jsonl").read_text().splitlines():
        trial = json.loads(line)
        assert {"trial", "params", "metrics", "status"} <= trial.keys()
        assert {"kl", "dnll", "nll", "ratio", "seconds"} <= trial["metrics"].keys()


@pytest.mark.ray
def test_only_a_trial_that_scored_all_windows_is_called_finished(finished: Finished) -> None:
    for record in finished.journal:
        assert (len(record.windows) == 4) == (record.status == "finished")
        assert len(record.windows) >= 2


@pytest.mark.ray
def test_the_plan_is_the_best_of_all_candidates_on_validation(finished: Finished) -> None:
    scores = {entry["name"]: entry["metrics"]["kl_geometric"] for entry in finished.summary["validation"]}
    assert finished.summary["winner"] == min(scores, key=lambda name: scores[name])
    rivals = {"uniform + streaming_llm", "baklava + heavy_hitter"}
    assert {f"{name}, 16 bits" for name in rivals} <= scores.keys()
    assert finished.plan.provenance.scores["validation_kl_geometric"] == pytest.approx(min(scores.values()))


@pytest.mark.ray
def test_the_plan_fits_the_model_and_the_budget_and_says_where_it_comes_from(finished: Finished, place: Place) -> None:
    plan, loaded = finished.plan, load(str(place.root / "model"))
    plan.validate_for(loaded.identity, loaded.geometry)
    assert plan.ratio <= 0.5
    assert plan.context_length == 192
    assert plan.provenance.profile
    assert list(plan.provenance.corpora) == [str(place.root / "texts")]
    assert {"baklava", "torch", "transformers", "ray", "optuna"} <= plan.provenance.versions.keys()
    assert plan.provenance.seed == 0


@pytest.mark.ray
def test_no_window_that_chose_the_winner_was_seen_by_a_trial(finished: Finished) -> None:
    searched = {window["document"] for record in finished.journal for window in record.windows}
    report = (finished.out / "report.html").read_text()
    assert searched
    assert "that no trial was scored on" in " ".join(report.split())
    assert finished.plan.provenance.scores["validation_nll_full"] != finished.journal[0].metrics["nll_full"]


@pytest.mark.ray
def test_progress_is_logged_throughout(finished: Finished) -> None:
    stages = [
        "texts: loading",
        "model: loading",
        "profiling",
        "ray:",
        "starting replicas",
        "prefilling",
        "search:",
        "validating",
    ]
    assert [stage for stage in stages if stage not in finished.log] == []
    for number in range(1, TRIALS + 1):
        lines = [line for line in finished.log.splitlines() if line.startswith(f"trial {number} of {TRIALS}: ")]
        assert len(lines) == 1
        assert lines[0].endswith(" left")
    assert "╭" not in finished.log  # Tune's own boxes


@pytest.mark.ray
def test_the_last_third_of_the_trials_refines_the_best_and_says_from_which_they_start(finished: Finished) -> None:
    refined = [record for record in finished.journal if record.parent_trial]
    assert [record.trial for record in refined] == list(range(TRIALS - TRIALS // 3 + 1, TRIALS + 1))
    by_number = {record.trial: record for record in finished.journal}
    for record in refined:
        assert by_number[record.parent_trial].status == "finished"
        line = next(
            line for line in finished.log.splitlines() if line.startswith(f"trial {record.trial} of {TRIALS}: ")
        )
        assert f", refined from trial {record.parent_trial}, " in line
        assert len(record.params["shifts"]) == 3
    assert any(entry["name"].startswith("trial") for entry in finished.summary["validation"])


@pytest.mark.ray
def test_what_the_search_was_worth_is_reported(finished: Finished) -> None:
    names = [rival["name"] for rival in finished.summary["rivals"]]
    assert names[-1] == "its own budgets, shuffled over the heads 3 times"
    assert f"{names[-1]}: " in finished.log
    assert names[-1] in (finished.out / "report.html").read_text()


@pytest.mark.ray
def test_three_next_steps_are_printed(finished: Finished) -> None:
    assert "make ui" in finished.log
    assert "baklava-serve --plan models:/baklava-model@champion --model " in finished.log
    assert f"baklava-evaluate --plan {finished.out / 'plan.json'} --model " in finished.log


class Page(HTMLParser):
    """Collects what an HTML page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        loading = {name for name, _ in attrs} & {"src", "href", "srcset", "data", "action"}
        self.fetched += [f"{tag} {name}" for name in loading] + [tag] * (tag in {"script", "link", "iframe"})


@pytest.mark.ray
def test_the_report_is_one_file_that_fetches_nothing_and_whose_charts_are_sound(finished: Finished) -> None:
    text = (finished.out / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.fetched == []
    assert "url(" not in text
    charts = [f"<svg{part.partition('</svg>')[0]}</svg>" for part in text.split("<svg")[1:]]
    assert len([ElementTree.fromstring(chart) for chart in charts]) in (4, 6)  # parameters need some finished trials
    assert "prefers-color-scheme: dark" in text


@pytest.mark.ray
def test_mlflow_has_one_finished_child_per_trial_with_its_parameters_and_plan(finished: Finished, place: Place) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{place.root / 'data/mlflow.db'}")
    parent = client.get_run(SearchRecord.read(finished.out).run)
    children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert parent.info.status == "FINISHED"
    assert {child.info.status for child in children} == {"FINISHED"}
    by_trial = {int(child.data.tags["baklava.trial"]): child for child in children}
    assert by_trial.keys() == {record.trial for record in finished.journal}
    for record in finished.journal:
        child = by_trial[record.trial]
        assert child.data.params == {name: str(value) for name, value in record.params.items() if name != "shifts"}
        assert child.data.metrics["kl"] == pytest.approx(record.metrics["kl"])
        files = {"plan.json", "budgets.svg", *(["shifts.json"] if "shifts" in record.params else [])}
        assert {file.path for file in client.list_artifacts(child.info.run_id)} == files


@pytest.mark.ray
def test_the_champion_resolves_to_the_plan(finished: Finished, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place.root / 'data/mlflow.db'}")
    file = mlflow.artifacts.download_artifacts(f"{finished.summary['champion']}/plan.json")
    assert BudgetPlan.read(file) == finished.plan
    version = mlflow.MlflowClient().get_model_version_by_alias("baklava-model", "champion")
    assert {"model", "budget", "dnll", "ratio"} <= version.tags.keys()


@pytest.fixture(scope="module")
def session(place: Place) -> Iterator[None]:
    """A cluster for the searches that run in this process, whose packages are loaded already."""
    with ray_session(object_store_bytes=OBJECT_STORE_BYTES):
        yield


@dataclass(frozen=True)
class Resumed:
    """A search for the least bytes within a bound that was killed amid its trials, and then resumed."""

    out: Path
    before: list[str]

    @property
    def journal(self) -> list[Any]:
        return Journal.open(self.out / TRIALS_FILE, TrialRecord.model_validate_json).records


@pytest.fixture(scope="module")
def resumed_search(place: Place, session: None) -> Resumed:
    out, log = place.root / "killed", place.root / "killed.log"
    process = start_search(*place.usual, "--max-dnll", 5, "--replicas", 1, "--out", out, log=log)
    wait_until(lambda: count_lines(out / "trials.jsonl") >= 3, process, log)
    kill(process.pid)
    process.wait()
    with (out / "trials.jsonl").open("a") as journal:
        journal.write('{"trial": 99, "par')  # what a kill amid a write leaves
    before = (out / "trials.jsonl").read_text().splitlines()[:-1]
    assert main(["--resume", str(out)]) == 0
    return Resumed(out, before)


@pytest.mark.ray
def test_a_killed_search_goes_on_and_neither_loses_nor_doubles_a_trial(resumed_search: Resumed) -> None:
    after = (resumed_search.out / "trials.jsonl").read_text().splitlines()
    records = resumed_search.journal
    assert after[: len(resumed_search.before)] == resumed_search.before
    assert [record.trial for record in records] == list(range(1, TRIALS + 1))
    assert len({json.dumps(record.params, sort_keys=True) for record in records}) == TRIALS


@pytest.mark.ray
def test_the_least_bytes_that_keep_a_bound_on_the_loss_are_found_or_it_is_said_that_none_do(
    resumed_search: Resumed,
) -> None:
    plan = BudgetPlan.read(resumed_search.out / "plan.json")
    records = resumed_search.journal
    assert plan.provenance.scores["validation_dnll"] <= 5
    assert plan.ratio <= min(record.metrics["ratio"] for record in records if record.status == "finished") * 1.01
    refined = [record for record in records if record.parent_trial]
    assert all(record.params["budget"] < records[record.parent_trial - 1].params["budget"] for record in refined)


@pytest.mark.ray
@pytest.mark.usefixtures("session")
def test_a_front_is_a_plan_file_per_size_and_the_report_draws_it(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place.root / "front"
    assert main([*place.usual, "--front", "--objective", "ppl", "--replicas", "1", "--out", str(out)]) == 0
    points = json.loads((out / "front.json").read_text())["points"]
    plans = [BudgetPlan.read(out / point["plan"]) for point in points]
    assert [plan.ratio for plan in plans] == sorted({plan.ratio for plan in plans})
    losses = [point["ppl"] for point in points]
    assert losses == sorted(losses, reverse=True)
    chosen = [plan for plan, point in zip(plans, points, strict=True) if point["chosen"]]
    assert chosen == [BudgetPlan.read(out / "plan.json")]
    assert "The line is the front of the validated plans" in (out / "report.html").read_text()
    records = Journal.open(out / TRIALS_FILE, TrialRecord.model_validate_json).records
    assert len({record.params["budget"] for record in records}) >= 4
    assert "perplexity" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.usefixtures("session")
@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_a_model_with_windows_or_states_is_searched(place: Place, tmp_path: Path, family: str) -> None:
    config, fields = FAMILIES[family]
    make_model(tmp_path / "model", config, **(fields | {"num_hidden_layers": 4}))
    options = ["--texts", str(place.root / "texts"), *SMALL_SEARCH_OPTIONS, "--trials", "4", "--replicas", "1"]
    command = ["--model", str(tmp_path / "model"), *options, "--out", str(tmp_path / "run")]
    assert main([*command, "--budget", "0.7"]) == 0
    loaded, plan = load(str(tmp_path / "model")), BudgetPlan.read(tmp_path / "run" / "plan.json")
    plan.validate_for(loaded.identity, loaded.geometry)
    assert [layer is not None for layer in plan.layers] == [window is None for window in loaded.geometry.windows]
    assert plan.ratio <= 0.7
    records = Journal.open(tmp_path / "run" / TRIALS_FILE, TrialRecord.model_validate_json).records
    assert {record.status for record in records} <= {"finished", "pruned"}


@pytest.fixture
def refused(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command with arguments that it must refuse; return its error message."""

    def run(*arguments: object, out: Path | None = None) -> str:
        out = out or tmp_path / "out"
        before = sorted(out.rglob("*")) if out.exists() else None
        assert main([*place.half, "--out", str(out), *map(str, arguments)]) == 2
        assert (sorted(out.rglob("*")) if out.exists() else None) == before
        return capsys.readouterr().err.splitlines()[-1]

    return run


def test_an_unknown_model_is_refused(refused: Callable[..., str]) -> None:
    assert "nobody/has-this" in refused("--model", "nobody/has-this")


def test_a_budget_that_holds_nothing_is_refused(refused: Callable[..., str]) -> None:
    assert "budget 0.001 leaves 0 entries per head" in refused("--budget", 0.001)


@pytest.mark.parametrize("budget", [0, -1, 1.5])
def test_a_budget_outside_its_range_is_refused(refused: Callable[..., str], budget: object) -> None:
    assert "above 0 and at most 1" in refused("--budget", budget)


def test_two_goals_are_refused(refused: Callable[..., str]) -> None:
    assert "are two goals" in refused("--max-dnll", 0.01)


def test_texts_shorter_than_a_window_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "longer texts" in refused("--texts", make_texts(tmp_path / "short", words=50))


def test_an_unknown_text_is_refused(refused: Callable[..., str]) -> None:
    assert "nothing-here" in refused("--texts", "nothing-here")


@pytest.mark.parametrize("option", ["--trials", "--context", "--continuation", "--replicas"])
def test_a_count_below_one_is_refused(refused: Callable[..., str], option: str) -> None:
    assert f"{option} 0 is out of range" in refused(option, 0)


def test_a_tracking_server_that_is_down_is_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert f"the tracking server at {uri} cannot be used" in refused()


def test_a_folder_that_holds_something_is_not_written_to(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    assert "choose another folder" in refused(out=tmp_path / "mine")


def test_a_result_for_machines_that_cannot_be_written_is_refused_first(refused: Callable[..., str]) -> None:
    assert "give a file in a folder that exists" in refused("--json", "/nowhere/at/all.json")


def test_resuming_takes_no_other_settings(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "takes its settings from" in refused("--resume", tmp_path)


@pytest.fixture
def resumed(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    def run(out: Path) -> str:
        assert main(["--resume", str(out)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


def test_resuming_what_is_no_search_is_refused(resumed: Callable[[Path], str], tmp_path: Path) -> None:
    assert "has no valid search.json" in resumed(tmp_path)


@pytest.mark.ray
def test_resuming_a_search_that_ended_is_refused(resumed: Callable[[Path], str], finished: Finished) -> None:
    assert "has ended" in resumed(finished.out)


@pytest.mark.ray
def test_resuming_on_texts_that_changed_is_refused(
    resumed: Callable[[Path], str], finished: Finished, place: Place, tmp_path: Path
) -> None:
    record = SearchRecord.read(finished.out)
    record.model_copy(update={"corpora": {str(place.root / "texts"): "other"}}).write(tmp_path)
    assert "changed since this search began" in resumed(tmp_path)


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_group_ends_a_search_that_can_be_resumed(place: Place, number: signal.Signals) -> None:
    out, log = place.root / number.name, place.root / f"{number.name}.log"
    process = start_search(*place.half, "--replicas", 1, "--trials", 200, "--out", out, log=log)
    wait_until(lambda: count_lines(out / "trials.jsonl") >= 1, process, log)
    os.killpg(process.pid, number)  # as a terminal and `timeout` do it
    assert process.wait(timeout=60) == 130
    assert ("running trials are finished and recorded" in log.read_text()) == (number == signal.SIGINT)
    records = Journal.open(out / TRIALS_FILE, TrialRecord.model_validate_json).records
    assert {record.status for record in records} <= {"finished", "pruned"}
    assert [record.trial for record in records] == list(range(1, len(records) + 1))
    assert f"baklava-search --resume {out}" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert "SIGTERM received" not in log.read_text()  # a stack of Ray's core
    client = MlflowClient(tracking_uri=f"sqlite:///{place.root / 'data/mlflow.db'}")
    assert client.get_run(SearchRecord.read(out).run).info.status == "KILLED"
    assert not (out / "plan.json").exists()
