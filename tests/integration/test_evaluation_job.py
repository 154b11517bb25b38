"""Facts about an evaluation as a job: resumable, the same on replicas, recorded in MLflow."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from mlflow import MlflowClient
from search_process import WORDS, make_model

from baklava.allocation.plan_spec import NamedPlan
from baklava.errors import UserError
from baklava.evaluation.speed.latency import Speed
from baklava.evaluation.summary import verdict
from baklava.paths import tracking_uri
from baklava.plan.budget_plan import Provenance
from baklava.runtime.model_loader import LoadedModel
from tuning.evaluation import runner as running
from tuning.evaluation.run_dir import EvaluationSettings
from tuning.evaluation.runner import Evaluated, evaluate, resume


def stopwatch(loaded: Any, plans: tuple[NamedPlan, ...]) -> dict[str, Speed]:
    return {named.name: Speed(100, 5.0, 2.0, 1.0, 1.1, 1 << 20) for named in plans}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EvaluationSettings:
    folder = tmp_path_factory.mktemp("evaluation")
    model = make_model(folder / "model")
    (folder / "texts").mkdir()
    for number in range(3):
        words = Random(number).choices(WORDS, k=300)
        sentences = [" ".join(words[at : at + 15]) + "." for at in range(0, 300, 15)]
        (folder / "texts" / f"{number}.txt").write_text("\n".join(sentences))
    return EvaluationSettings.of(
        model=str(model),
        plans=["full", "uniform:0.5", "uniform+heavy_hitter:0.6"],
        texts=[str(folder / "texts")],
        context=160,
        continuation=32,
        tasks=["needle", "few_shot", "copy"],
        prompts=2,
    )


@pytest.fixture(scope="module")
def whole(settings: EvaluationSettings, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    return evaluate(settings, tmp_path_factory.mktemp("whole") / "out", stopwatch)


def figures(evaluated: Evaluated) -> Any:
    return json.loads(evaluated.folder.scores.read_text())


def close(ours: Any, theirs: Any) -> bool:
    """Equal but for the rounding of another number of threads."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(close(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(close, ours, theirs))
    return ours == pytest.approx(theirs, abs=1e-4) if isinstance(ours, float) else ours == theirs


def test_everything_is_in_the_folder(whole: Evaluated) -> None:
    found = figures(whole)["plans"]
    assert [each["name"] for each in found] == ["full", "uniform:0.5", "uniform+heavy_hitter:0.6"]
    assert all(each["tasks"].keys() == {"needle", "few_shot", "copy"} for each in found)
    assert len(found[0]["windows"]) == 3
    content = json.loads(whole.folder.windows.read_text())
    assert (content["context"], content["continuation"]) == (160, 32)
    assert "uniform:0.5" in whole.folder.report.read_text()


def test_a_killed_evaluation_goes_on_where_it_was(
    settings: EvaluationSettings, whole: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    original = running.results

    def dying(*arguments: Any) -> Iterator[Any]:
        for result in original(*arguments):
            if len(done) == 4:
                raise KeyboardInterrupt
            done.append(result.name)
            yield result

    with monkeypatch.context() as broken:
        broken.setattr(running, "results", dying)
        with pytest.raises(KeyboardInterrupt):
            evaluate(settings, tmp_path / "out", stopwatch)
    with (tmp_path / "out" / "results.jsonl").open("a") as file:
        file.write('{"kind": "prompt", "na')  # a kill in the middle of a line
    asked: list[int] = []
    monkeypatch.setattr(running, "results", lambda *given: (asked.append(len(given[2])), original(*given))[1])
    assert close(figures(resume(tmp_path / "out", stopwatch)), figures(whole))
    assert asked == [9 - 4]


@pytest.mark.ray
def test_replicas_find_the_same(settings: EvaluationSettings, whole: Evaluated, tmp_path: Path) -> None:
    found = evaluate(settings.model_copy(update={"replicas": 2}), tmp_path / "out", stopwatch)
    assert close(figures(found), figures(whole))


def test_every_plan_is_a_run_in_mlflow(whole: Evaluated) -> None:
    client = MlflowClient(tracking_uri=tracking_uri())
    experiment = client.get_experiment_by_name("baklava/model")
    (parent,) = client.search_runs([experiment.experiment_id], f"tags.`baklava.out` = '{whole.folder.path.absolute()}'")
    children = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert {child.info.run_name for child in children} == {each.named.name for each in whole.evaluations}
    metrics = next(child for child in children if child.info.run_name == "uniform:0.5").data.metrics
    assert metrics["kl"] == pytest.approx(whole.evaluations[1].mean("kl").mean)
    assert metrics["needle/exact"] == whole.evaluations[1].tasks["needle"].exact
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"report.html", "scores.json"}


def test_a_server_that_is_down_is_told_before_any_work(
    settings: EvaluationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="start it, or unset"):
        evaluate(settings, tmp_path / "out", stopwatch)
    assert not (tmp_path / "out").exists()


def test_the_ratio_is_stated_at_a_window_whatever_the_prompts(settings: EvaluationSettings, tmp_path: Path) -> None:
    longer = settings.model_copy(update={"lengths": (200, 300), "tasks": ("needle",), "prompts": 1, "speed": False})
    found = evaluate(longer, tmp_path / "out", stopwatch)
    assert [each.named.plan.context_length for each in found.evaluations] == [300, 192, 192]
    assert [each.cut for each in found.evaluations] == [0, 3, 3]
    assert found.evaluations[0].tasks.keys() == {"needle@200", "needle@300"}
    assert found.evaluations[0].tasks["needle@300"].loss.mean == 0.0


def test_what_a_plan_never_cut_is_told(settings: EvaluationSettings, tmp_path: Path) -> None:
    short = settings.model_copy(update={"lengths": (96,), "tasks": ("needle",), "prompts": 2, "speed": False})
    found = evaluate(short, tmp_path / "out", stopwatch).evaluations
    assert [each.tasks["needle"].cut for each in found] == [0, 0, 0]
    assert found[1].tasks["needle"].loss.mean == 0.0
    told = verdict(found)
    assert any(
        "uniform:0.5 loses nothing of up to 96 tokens" in each and "2 prompts of needle" in each for each in told
    )
    assert not any("full loses nothing" in each for each in told)


def test_a_model_that_changed_is_not_gone_on_with(
    settings: EvaluationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(running, "results", lambda *given: iter(()))
        with pytest.raises(KeyError):
            evaluate(settings.model_copy(update={"tasks": ()}), tmp_path / "out", stopwatch)
    monkeypatch.setattr(LoadedModel, "weights_digest", "other")
    with pytest.raises(UserError, match="changed since this evaluation began"):
        resume(tmp_path / "out", stopwatch)


def test_a_finished_evaluation_is_one_run_however_often_it_is_resumed(whole: Evaluated) -> None:
    resume(whole.folder.path, stopwatch)
    client = MlflowClient(tracking_uri=tracking_uri())
    experiment = client.get_experiment_by_name("baklava/model")
    found = client.search_runs([experiment.experiment_id], f"tags.`baklava.out` = '{whole.folder.path.absolute()}'")
    assert len(found) == 1
    assert found[0].info.status == "FINISHED"


def test_a_plan_made_from_the_text_is_told(whole: Evaluated) -> None:
    first = whole.evaluations[1]
    plan = first.named.plan.model_copy(update={"provenance": Provenance(corpora={"mine": "0"})})
    known = replace(first, named=NamedPlan("p", plan))
    assert any("was made from mine" in each for each in verdict([known], ["mine", "other"]))
    assert not any("was made from" in each for each in verdict([known], ["other"]))


def test_two_files_of_one_benchmark_are_refused(settings: EvaluationSettings, tmp_path: Path) -> None:
    row = {"input": "What is it?", "context": "A long text.", "answers": ["a text"]}
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    both = tuple(f"longbench:qasper={tmp_path}/{name}.jsonl" for name in ("a", "b"))
    given = settings.model_copy(update={"tasks": both, "lengths": (500,)})
    with pytest.raises(UserError, match="two prompts are named longbench:qasper:0"):
        evaluate(given, tmp_path / "out", stopwatch)
    assert not (tmp_path / "out").exists()
