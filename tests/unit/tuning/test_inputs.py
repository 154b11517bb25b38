"""Inputs of a search and of an evaluation: no token without embedding, no content on both sides."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from search_process import make_model, make_texts
from transformers import AutoTokenizer

from baklava.data.windows import Window
from baklava.errors import UserError
from baklava.runtime.model_loader import LoadedModel, load
from tuning.evaluation import inputs as evaluation_inputs
from tuning.evaluation.run_dir import EvaluationSettings
from tuning.search import inputs as search_inputs
from tuning.study.settings import SearchSettings

LENGTHS = {"context": 80, "continuation": 16}


class ProfiledError(Exception):
    """Ends the preparation where a profile would be measured."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has a token more than it has embeddings."""
    folder = make_model(tmp_path_factory.mktemp("inputs") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> list[Window]:
    """The windows that a profile would be measured on."""
    found: list[Window] = []

    def cached_profile(loaded: LoadedModel, windows: tuple[Window, ...]) -> Any:
        found.extend(windows)
        raise ProfiledError

    for module in (evaluation_inputs, search_inputs):
        monkeypatch.setattr(module, "cached_profile", cached_profile)
    return found


def evaluation_of(model: Path, texts: Path, calibration: Path) -> EvaluationSettings:
    return EvaluationSettings.from_options(
        model=str(model), plans=["baklava:0.5"], texts=[str(texts)], calibration=[str(calibration)], **LENGTHS
    )


def test_an_evaluation_profiles_on_no_copy_of_what_it_scores(
    model: Path, tmp_path: Path, profiled: list[Window]
) -> None:
    texts = make_texts(tmp_path / "texts", count=3)
    calibration = make_texts(tmp_path / "calibration", count=8)  # the first three are the same, under other names
    loaded = load(str(model))
    with pytest.raises(ProfiledError):
        evaluation_inputs.prepare_inputs(evaluation_of(model, texts, calibration), loaded)
    assert {Path(window.document).name for window in profiled} <= {f"text{number}.txt" for number in range(3, 8)}
    assert len(profiled) == 3


@pytest.mark.parametrize("where", ["texts", "calibration"])
def test_an_evaluation_names_a_token_without_embedding(model: Path, tmp_path: Path, where: str) -> None:
    folders = {name: make_texts(tmp_path / name, seed=seed) for seed, name in enumerate(["texts", "calibration"])}
    for file in folders[where].iterdir():
        file.write_text(f"<extra> {file.read_text()}")
    with pytest.raises(UserError, match=r"token 62 \(<extra>\) has no embedding in .*, which has 62"):
        evaluation_inputs.prepare_inputs(evaluation_of(model, **folders), load(str(model)))


def search_of(model: Path, *texts: Path) -> SearchSettings:
    return SearchSettings(model=str(model), texts=tuple(map(str, texts)), budget=0.5, trials=1, **LENGTHS)


def test_a_search_names_a_token_without_embedding(model: Path, tmp_path: Path, profiled: list[Window]) -> None:
    texts = make_texts(tmp_path / "texts", count=11)
    for file in texts.iterdir():
        file.write_text(f"<extra> {file.read_text()}")
    with pytest.raises(UserError, match=r"token 62 \(<extra>\) has no embedding"):
        search_inputs.prepare_inputs(search_of(model, texts))
    assert profiled == []


def test_texts_of_a_search_that_overlap_are_in_one_split(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = make_texts(tmp_path / "texts", count=4)
    copies = make_texts(tmp_path / "copies", count=4)
    for file in copies.iterdir():
        file.write_text(f"\ufeff{file.read_text()} \r\n")
    monkeypatch.setattr(search_inputs, "cached_profile", lambda *_: None)
    monkeypatch.setattr(search_inputs, "SearchInputs", lambda **fields: fields)
    found: Any = search_inputs.prepare_inputs(search_of(model, texts, copies, texts / "text1.txt"))
    splits = found["splits"]
    used = [{Path(w.document).name for w in part} for part in (splits.calibration, splits.search, splits.validation)]
    assert not any(one & other for one, other in combinations(used, 2))
    assert len(found["corpora"]) == 3
