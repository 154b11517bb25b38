import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from search_process import make_model

from baklava.errors import UserError
from baklava.evaluation.intervals import bootstrap_mean
from tuning.evaluation import runner
from tuning.evaluation.run_dir import EvaluationSettings

ROOT = Path(__file__).parents[2]


def evaluate(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "evaluate.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def window_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two windows of real token ids for the demo model, as another program would write them."""
    from transformers import AutoTokenizer

    from baklava.data.demo_assets import demo_model
    from baklava.data.documents import load_documents

    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    cut = [
        {"name": d.name, "ids": tokenizer(d.text, add_special_tokens=False, verbose=False)["input_ids"][:384]}
        for d in load_documents(["ifcraft"])[:2]
    ]
    path = tmp_path_factory.mktemp("windows") / "windows.json"
    path.write_text(json.dumps({"context": 320, "continuation": 64, "windows": cut}))
    return path


@pytest.mark.demo
def test_one_command_compares_plans_on_a_window_file(tmp_path: Path, window_file: Path) -> None:
    out = tmp_path / "scores.json"
    plans = ["--plan", "full", "--plan", "uniform:0.3", "--plan", "uniform+heavy_hitter:0.3"]
    tasks = [
        "--tasks",
        "needle",
        "few_shot",
        "--prompts",
        "1",
        "--no-speed",
        "--replicas",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    done = evaluate(*plans, "--windows", str(window_file), "--json", str(out), *tasks)
    assert "uniform+heavy_hitter:0.3 keeps 30.0% of the bytes" in done.stdout
    assert (tmp_path / "run" / "scores.json").read_text() == out.read_text()
    full, streaming, heavy = json.loads(out.read_text())["plans"]
    assert abs(full["mean"]["dnll"]) < 1e-4
    assert full["plan"]["ratio"] == 1.0
    assert 0 < heavy["mean"]["kl"] < streaming["mean"]["kl"]
    for each in (full, streaming, heavy):
        assert 0 < each["allocated_bytes"] <= each["plan"]["bytes_per_sequence"]
        assert each["plan"]["bytes_per_sequence"] <= each["plan"]["full_bytes_per_sequence"]
        assert len(each["windows"]) == 2
        for window in each["windows"]:
            assert window["dnll"] == pytest.approx(window["nll"] - window["nll_full"])
        assert each["tasks"]["few_shot"]["n"] == 8
        assert each["tasks"]["few_shot"]["chance"] == 0.25
    assert full["tasks"]["needle"]["score"] == full["tasks"]["needle"]["full"]["score"]
    check_report(tmp_path / "run" / "report.html")


def check_report(report: Path) -> None:
    """Open the report in a browser if there is one, and check that it loads nothing from elsewhere."""
    page = report.read_text()
    assert not re.search(r"<script|<link|@import|url\(|(src|href)=", page)
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
        options = [*quiet, "--headless", "--enable-logging=stderr", f"--user-data-dir={report.parent / 'browser'}"]
        command = [browser, *options, "--dump-dom", report.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert "CONSOLE" not in done.stderr
        assert done.stdout.count("<svg") == 2


def test_a_usage_error_is_one_sentence_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path / "model")
    window = {"context": 24, "continuation": 8, "windows": [{"name": "w", "ids": [*range(2, 34)]}]}
    (tmp_path / "windows.json").write_text(json.dumps(window))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "short.txt").write_text("A few words.")
    windows = ["--model", str(model), "--windows", str(tmp_path / "windows.json")]
    cases = [
        (["--plan", "full", *windows, "--model", str(tmp_path / "nothing")], "cannot load model"),
        (["--plan", "pagoda:0.3", *windows], "choose one of uniform, baklava"),
        (["--plan", "uniform+h2o:0.3", *windows], "choose one of streaming_llm, heavy_hitter"),
        (["--plan", "uniform", *windows], "write uniform:0.3"),
        (["--plan", "uniform:much", *windows], "is not a share of the bytes"),
        (["--plan", str(tmp_path / "plan.json"), *windows], "is not a valid plan"),
        (
            ["--plan", "full", "--model", str(model), "--texts", str(tmp_path / "short.txt")],
            "a window needs 3072 of context",
        ),
        (["--plan", "full", "--plan", "full", *windows], "is given twice"),
        (["--plan", "full", "--tasks", "qa", *windows], "choose from passkey"),
        (["--plan", "full", "--tasks", "all", "needle", *windows], "needle is given twice"),
        (["--plan", "full", "--tasks", "longbench:dureader", *windows], "no data set 'dureader'"),
        (["--plan", "full", "--tasks", "needle", "--lengths", "20", *windows], "more than 20"),
        (["--plan", "full", "--tasks", "needle", "--lengths", "9000", *windows], "lower --lengths"),
        (["--plan", "full", "--seed", "-1", *windows], "--seed is a number, at least 0"),
        (["--plan", "full", "--out", str(tmp_path), *windows], "exists already"),
        (["--resume", str(tmp_path)], "has no valid evaluation.json"),
        (["--resume", str(tmp_path), "--plan", "full"], "takes its settings from"),
        ([*windows], "no plan is given"),
        (["--plan", "full", "--json", "/nowhere/at/all.json"], "give a file in a folder that exists"),
    ]
    for arguments, said in cases:
        monkeypatch.chdir(tmp_path / "elsewhere")
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--json", str(tmp_path / "out.json"), *arguments])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / "jobs" / "evaluate.py"), run_name="__main__")
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert exit.value.code == 2
        assert last.startswith("baklava-evaluate: ")
        assert said in last
        assert not (tmp_path / "out.json").exists()
    assert not (Path.cwd() / "runs").exists()


@pytest.mark.parametrize("plan", ["pagoda:0.3", "pagoda.json"])
def test_a_misspelt_plan_is_refused_before_the_weights_are_read(
    plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model")
    monkeypatch.setattr(runner, "load", lambda *_, **__: pytest.fail("it reads the weights"))
    with pytest.raises(UserError, match="pagoda"):
        runner.evaluate(EvaluationSettings.from_options(model=str(model), plans=[plan]), tmp_path / "out")


def test_the_script_itself_ends_without_a_traceback() -> None:
    done = evaluate("--plan", "full", "--json", "/nowhere/at/all.json", code=2)
    assert "give a file in a folder that exists" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interval_covers_the_mean_and_narrows_with_documents() -> None:
    rng = np.random.default_rng(0)
    few = bootstrap_mean(rng.normal(1, 1, 5).tolist(), [f"d{i}" for i in range(5)])
    many = bootstrap_mean(rng.normal(1, 1, 500).tolist(), [f"d{i}" for i in range(500)])
    assert few.low < few.mean < few.high
    assert many.high - many.low < few.high - few.low
    assert many.low < 1 < many.high


def test_intervals_of_few_documents_cover_the_mean_95_times_of_100() -> None:
    rng, names = np.random.default_rng(1), list("abcd")
    found = [bootstrap_mean(rng.normal(1, 1, 4).tolist(), names) for _ in range(400)]
    assert 0.92 < np.mean([each.low < 1 < each.high for each in found]) < 0.99


def test_windows_of_one_document_do_not_count_as_independent() -> None:
    values = [0.0] * 10 + [1.0] * 10
    apart = bootstrap_mean(values, [f"d{i}" for i in range(20)])
    together = bootstrap_mean(values, ["a"] * 10 + ["b"] * 10)
    assert together.high - together.low > apart.high - apart.low
    assert math.isnan(bootstrap_mean([1.0, 2.0], ["a", "a"]).low)
