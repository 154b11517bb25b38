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

from baklava.allocation.plan_spec import ResolvedPlan
from baklava.errors import UserError
from baklava.evaluation.results import summarize
from baklava.evaluation.speed import Speed
from baklava.paths import tracking_uri
from baklava.plan.budget_plan import Provenance
from baklava.runtime.model_loader import LoadedModel
from tuning.evaluation import runner
from tuning.evaluation.run_dir import EvaluationSettings
from tuning.evaluation.runner import EvaluationResult, evaluate, resume


@pytest.fixture(scope="module", autouse=True)
def fixed_speeds() -> Iterator[None]:
    def measure_speeds(loaded: Any, plans: tuple[ResolvedPlan, ...]) -> dict[str, Speed]:
        return {named.name: Speed(100, 5.0, 2.0, 1.0, 1.1, 1 << 20) for named in plans}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "measure_speeds", measure_speeds)
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EvaluationSettings:
    folder = tmp_path_factory.mktemp("evaluation")
    model = make_model(folder / "model")
    (folder / "texts").mkdir()
    for number in range(3):
        words = Random(number).choices(WORDS, k=300)
        sentences = [" ".join(words[at : at + 15]) + "." for at in range(0, 300, 15)]
        (folder / "texts" / f"{number}.txt").write_text("\n".join(sentences))
    return EvaluationSettings.from_options(
        model=str(model),
        plans=["full", "uniform:0.5", "uniform+heavy_hitter:0.6"],
        texts=[str(folder / "texts")],
        context=160,
        continuation=32,
        tasks=["needle", "few_shot", "copy"],
        prompts=2,
    )


@pytest.fixture(scope="module")
def complete(settings: EvaluationSettings, tmp_path_factory: pytest.TempPathFactory) -> EvaluationResult:
    return evaluate(settings, tmp_path_factory.mktemp("complete") / "out")


def scores(result: EvaluationResult) -> Any:
    return json.loads(result.run_dir.scores_path.read_text())


def close(ours: Any, theirs: Any) -> bool:
    """Equal but for the rounding of another number of threads."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(close(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(close, ours, theirs))
    return ours == pytest.approx(theirs, abs=1e-4) if isinstance(ours, float) else ours == theirs


def test_everything_is_in_the_folder(complete: EvaluationResult) -> None:
    found = scores(complete)["plans"]
    assert [plan["name"] for plan in found] == ["full", "uniform:0.5", "uniform+heavy_hitter:0.6"]
    assert all(plan["tasks"].keys() == {"needle", "few_shot", "copy"} for plan in found)
    assert len(found[0]["windows"]) == 3
    content = json.loads(complete.run_dir.windows_path.read_text())
    assert (content["context"], content["continuation"]) == (160, 32)
    assert "uniform:0.5" in complete.run_dir.report_path.read_text()


def test_a_killed_evaluation_is_resumed_where_it_was(
    settings: EvaluationSettings, complete: EvaluationResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    original = runner.evaluate_items

    def dying(*arguments: Any) -> Iterator[Any]:
        for result in original(*arguments):
            if len(done) == 4:
                raise KeyboardInterrupt
            done.append(result.name)
            yield result

    with monkeypatch.context() as broken:
        broken.setattr(runner, "evaluate_items", dying)
        with pytest.raises(KeyboardInterrupt):
            evaluate(settings, tmp_path / "out")
    with (tmp_path / "out" / "results.jsonl").open("a") as file:
        file.write('{"kind": "prompt", "na')  # a kill in the middle of a line
    counts: list[int] = []
    monkeypatch.setattr(runner, "evaluate_items", lambda *args: (counts.append(len(args[2])), original(*args))[1])
    assert close(scores(resume(tmp_path / "out")), scores(complete))
    assert counts == [9 - 4]


@pytest.mark.ray
def test_several_workers_give_the_same_scores(
    settings: EvaluationSettings, complete: EvaluationResult, tmp_path: Path
) -> None:
    found = evaluate(settings.model_copy(update={"replicas": 2}), tmp_path / "out")
    assert close(scores(found), scores(complete))


def test_every_plan_is_a_run_in_mlflow(complete: EvaluationResult) -> None:
    client = MlflowClient(tracking_uri=tracking_uri())
    experiment = client.get_experiment_by_name("baklava/model")
    (parent,) = client.search_runs(
        [experiment.experiment_id], f"tags.`baklava.out` = '{complete.run_dir.path.absolute()}'"
    )
    children = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert {child.info.run_name for child in children} == {evaluation.name for evaluation in complete.evaluations}
    metrics = next(child for child in children if child.info.run_name == "uniform:0.5").data.metrics
    assert metrics["kl"] == pytest.approx(complete.evaluations[1].mean("kl").mean)
    assert metrics["needle/score"] == complete.evaluations[1].tasks["needle"].score
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"report.html", "scores.json"}


def test_the_runs_in_mlflow_span_the_evaluation_and_name_their_source(complete: EvaluationResult) -> None:
    client = MlflowClient(tracking_uri=tracking_uri())
    experiment = client.get_experiment_by_name("baklava/model")
    parent = client.get_run(complete.run_dir.mlflow_run_path.read_text().strip())
    children = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    for run in (parent, *children):
        assert run.info.start_time == complete.run_dir.read_record().started_ms
        assert run.info.start_time < complete.run_dir.scores_path.stat().st_mtime * 1000
        assert run.info.end_time > complete.run_dir.report_path.stat().st_mtime * 1000 - 1
        assert run.data.tags["mlflow.source.name"] == "baklava-evaluate"


def test_a_registered_plan_is_evaluated_by_its_alias(
    settings: EvaluationSettings, complete: EvaluationResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(uri, uri)
    run = client.create_run(client.create_experiment("plans", artifact_location=tmp_path.as_uri())).info.run_id
    client.log_dict(run, complete.evaluations[1].plan.model_dump(mode="json"), "plan/plan.json")
    client.create_registered_model("rivers")
    client.create_model_version("rivers", source=f"runs:/{run}/plan", run_id=run)
    client.set_registered_model_alias("rivers", "champion", "1")
    registered = {"plans": ("models:/rivers@champion",), "tasks": (), "speed": False}
    result = evaluate(settings.model_copy(update=registered), tmp_path / "out")
    assert [evaluation.name for evaluation in result.evaluations] == ["models:/rivers@champion"]
    assert result.evaluations[0].values("kl") == pytest.approx(complete.evaluations[1].values("kl"), abs=1e-4)


def test_a_server_that_is_down_is_an_error_before_any_work(
    settings: EvaluationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="it does not answer; start it"):
        evaluate(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_ratio_is_stated_at_a_window_whatever_the_prompts(settings: EvaluationSettings, tmp_path: Path) -> None:
    longer = settings.model_copy(update={"lengths": (200, 300), "tasks": ("needle",), "prompts": 1, "speed": False})
    found = evaluate(longer, tmp_path / "out")
    assert [evaluation.plan.context_length for evaluation in found.evaluations] == [300, 192, 192]
    assert [evaluation.num_compressed for evaluation in found.evaluations] == [0, 3, 3]
    assert found.evaluations[0].tasks.keys() == {"needle@200", "needle@300"}
    assert found.evaluations[0].tasks["needle@300"].loss.mean == 0.0


def test_the_summary_names_what_a_plan_never_compressed(settings: EvaluationSettings, tmp_path: Path) -> None:
    short = settings.model_copy(update={"lengths": (96,), "tasks": ("needle",), "prompts": 2, "speed": False})
    found = evaluate(short, tmp_path / "out").evaluations
    assert [evaluation.tasks["needle"].num_compressed for evaluation in found] == [0, 0, 0]
    assert found[1].tasks["needle"].loss.mean == 0.0
    summary = summarize(found)
    (sentence,) = (line for line in summary if "uniform:0.5 loses nothing of up to 96 tokens" in line)
    assert "2 prompts of needle" in sentence
    assert not any("full loses nothing" in line for line in summary)


def test_an_evaluation_of_a_model_that_changed_is_not_resumed(
    settings: EvaluationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(runner, "evaluate_items", lambda *args: (item for item in ()))
        with pytest.raises(KeyError):
            evaluate(settings.model_copy(update={"tasks": ()}), tmp_path / "out")
    monkeypatch.setattr(LoadedModel, "weights_digest", "other")
    with pytest.raises(UserError, match="changed since this evaluation began"):
        resume(tmp_path / "out")


def test_a_finished_evaluation_is_one_run_however_often_it_is_resumed(complete: EvaluationResult) -> None:
    resume(complete.run_dir.path)
    client = MlflowClient(tracking_uri=tracking_uri())
    experiment = client.get_experiment_by_name("baklava/model")
    found = client.search_runs([experiment.experiment_id], f"tags.`baklava.out` = '{complete.run_dir.path.absolute()}'")
    assert len(found) == 1
    assert found[0].info.status == "FINISHED"


def test_the_summary_warns_of_a_plan_made_from_the_text(complete: EvaluationResult) -> None:
    first = complete.evaluations[1]
    plan = first.plan.model_copy(update={"provenance": Provenance(corpora={"mine": "0"})})
    known = replace(first, name="p", plan=plan)
    assert any("was made from mine" in line for line in summarize([known], ["mine", "other"]))
    assert not any("was made from" in line for line in summarize([known], ["other"]))


def test_two_files_of_one_benchmark_are_refused(settings: EvaluationSettings, tmp_path: Path) -> None:
    row = {"input": "What is it?", "context": "A long text.", "answers": ["a text"]}
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    both = tuple(f"longbench:qasper={tmp_path}/{name}.jsonl" for name in ("a", "b"))
    changed = settings.model_copy(update={"tasks": both, "lengths": (500,)})
    with pytest.raises(UserError, match="two prompts are named longbench:qasper:0"):
        evaluate(changed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
