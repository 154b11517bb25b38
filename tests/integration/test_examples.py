"""The scripts in examples/ run as their first lines say."""

import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from search_process import make_model, make_texts

from baklava.eviction import METHODS

ROOT = Path(__file__).parents[2]
SIZES = ["--context", "256", "--continuation", "32"]


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        ("generate.py", ["--prompt", "w1 w2 w3 w4 w5 " * 60, "--tokens", "8"], "bytes; the full cache has"),
        ("compare_plans.py", ["TEXTS", *SIZES], "baklava:0.25"),
        ("custom_eviction.py", ["TEXTS", *SIZES], "uniform+value_norm"),
    ],
)
def test_an_example_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
    options: list[str],
    expected: str,
) -> None:
    model, texts = make_model(tmp_path / "model"), make_texts(tmp_path / "texts")
    options = [str(texts) if option == "TEXTS" else option for option in options]
    monkeypatch.setenv("BAKLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", [script, "--model", str(model), *options])
    with patch.dict(METHODS):  # an example adds its own
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert expected in capsys.readouterr().out


def test_every_example_is_run() -> None:
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert scripts == {"generate.py", "compare_plans.py", "custom_eviction.py"}
