"""Tasks of lm-evaluation-harness from end to end, on local files."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
from lm_eval.api.registry import get_model, model_registry
from lm_eval.tasks import TaskManager

from baklava.allocation.plan_spec import resolve_plan
from baklava.evaluation.lm_eval import BaklavaLM
from baklava.plan.budget_plan import full_cache_plan
from baklava.runtime.model_loader import LoadedModel

ROOT = Path(__file__).parents[3]

TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}\nQuestion: what is this text about?\nAnswer:",
        "doc_to_choice": ["interactive fiction and its craft", "the price of tin in the year 1850"],
        "doc_to_target": 0,
    },
    "story": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one task of each kind over two short documents, all of it local."""
    text = "The player of interactive fiction types what to do, and the story answers. " * 4
    rows = [{"text": text}, {"text": "North of the house " + text}]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        whole = {
            "task": f"baklava_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": str(data), "cache_dir": str(tmp_path / "cache")},
            "test_split": "train",
            **task,
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML
    return tmp_path


@pytest.mark.demo
def test_the_harness_runs_a_task_of_each_kind(
    demo: LoadedModel, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The harness describes the machine in its results, for which it asks pip for all packages.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = {}
    for name in ("full", "uniform:0.3"):
        plan = resolve_plan(name, demo, 1024 if name == "full" else 80, lambda: pytest.fail("no profile")).plan
        ran = lm_eval.simple_evaluate(
            model=BaklavaLM(demo, plan, max_length=1024),
            tasks=[f"baklava_{name}" for name in TASKS],
            task_manager=manager,
            limit=1,
            bootstrap_iters=0,
            apply_chat_template=False,
        )
        assert ran is not None
        results[name] = ran
    for name, affected in (("full", 0), ("uniform:0.3", 1)):
        info = results[name]["config"]
        counts = {each["kind"]: each for each in info["plan_requests"]}
        assert {kind: each["requests"] for kind, each in counts.items()} == {
            "loglikelihood": 2,
            "generate_until": 1,
            "loglikelihood_rolling": 1,
        }
        assert all(each["affected"] == affected * each["requests"] for each in counts.values())
    bits = {name: ran["results"]["baklava_perplexity"]["bits_per_byte,none"] for name, ran in results.items()}
    assert 0 < bits["full"] < bits["uniform:0.3"] < 3
    assert "say nothing about the plan" in capsys.readouterr().err


@pytest.mark.demo
def test_the_chat_template_is_that_of_the_model(demo: LoadedModel) -> None:
    model = BaklavaLM(demo, full_cache_plan(demo.identity, demo.geometry, 100))
    turns = [{"role": "user", "content": "Say hello."}]
    assert model.apply_chat_template(turns).endswith("<|im_start|>assistant\n")
    assert model.chat_template(True) == demo.tokenizer.chat_template
    assert model.tokenizer_name == "demo"


@pytest.mark.demo
def test_one_command_runs_a_task(tasks: Path) -> None:
    model = "pretrained=demo,plan=uniform+heavy_hitter:0.3,context_length=200"
    where = ["--include_path", str(tasks), "--output_path", str(tasks / "out"), "--apply_chat_template"]
    command = ["run", "--model", "baklava", "--model_args", model, "--tasks", "baklava_choice", "--limit", "1", *where]
    script = [sys.executable, str(ROOT / "jobs" / "harness.py")]
    done = subprocess.run([*script, *command], capture_output=True, text=True, cwd=tasks, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "baklava: loglikelihood: 2 of 2 requests" in done.stderr
    [written] = (tasks / "out").rglob("results_*.json")
    content = json.loads(written.read_text())
    assert content["config"]["plan"]["ratio"] <= 0.3
    assert "acc,none" in content["results"]["baklava_choice"]


def test_a_usage_error_is_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:  # the harness's own command line reads thousands of task files first
        get_model("baklava").create_from_arg_obj({"pretrained": "demo", "plan": "uniform:0.3"}, {"batch_size": 4})

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", run)
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "jobs" / "harness.py"), run_name="__main__")
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("harness: batch_size 4: a plan bounds one sequence")


def test_the_harness_keeps_the_models_that_it_comes_with() -> None:
    assert {"baklava", "hf", "dummy"} <= set(model_registry.keys())
