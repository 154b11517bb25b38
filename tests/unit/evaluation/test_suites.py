"""Suites: rows in the published formats become prompts that fit, and errors are one sentence."""

import json
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baklava.data.hub_datasets import stream_file_rows
from baklava.errors import UserError
from baklava.evaluation.suites import SUITES, LongBench, Ruler, load_prompts, parse_suite_spec
from baklava.evaluation.suites.base import fit_prompt
from baklava.evaluation.suites.longbench import FORMATS
from baklava.evaluation.tasks.metrics import METRICS
from baklava.runtime.model_loader import LoadedModel

MAX_TOKENS = 10_000


class Words:
    """A tokenizer whose tokens are words with the white space after them, and and one special token."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        words = text.replace("\n", " \n ").split(" ")
        self.texts += [word for word in words if word not in self.texts]
        return [0] * add_special_tokens + [self.texts.index(word) for word in words]

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.texts[id] for id in ids).replace(" \n ", "\n")


def longbench_row(**fields: Any) -> dict[str, Any]:
    row = {
        "input": "Who wrote it?",
        "context": "A text by Ada.",
        "answers": ["Ada", "Ada L."],
        "length": 4,
        "dataset": "qasper",
        "language": "en",
        "all_classes": None,
        "_id": "0",
    }
    return row | fields


def v2_row(**fields: Any) -> dict[str, Any]:
    row = {"_id": "0", "domain": "Single-Document QA", "sub_domain": "Law", "difficulty": "hard", "length": "short"}
    row |= {"question": " Who? ", "choice_A": "Ada", "choice_B": "Bob\n", "choice_C": "Cy", "choice_D": "Di"}
    return row | {"answer": "B", "context": "  It was Bob. "} | fields


def ruler_row(**fields: Any) -> dict[str, Any]:
    row = {
        "context": "Some special magic numbers are hidden within the following text.\nOne of them for cat is: 7.\n",
        "question": "What are all the special magic numbers for cat mentioned in the provided text?",
        "answer_prefix": " The special magic numbers for cat mentioned in the provided text are",
        "answer": ["7", "8"],
        "task": "niah_multivalue",
        "max_new_tokens": 128,
    }
    return row | fields


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


def test_longbench_asks_in_its_own_words_after_the_context(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "qasper.jsonl", [longbench_row()])
    (prompt,) = load_prompts(f"longbench:qasper={file}", 5, tokens=MAX_TOKENS, tokenizer=Words())
    (question,) = prompt.questions
    assert prompt.name == "longbench:qasper:0"
    assert prompt.context.startswith("You are given a scientific article and a question.")
    assert prompt.context.endswith("Do not provide any explanation.\n\nArticle: A text by Ada.")
    assert question.text.startswith("\n\n Answer the question based on the above article as concisely as you can,")
    assert question.text.endswith("\n\nQuestion: Who wrote it?\n\nAnswer:")
    assert (question.target, question.answers) == (" Ada", ("Ada", "Ada L."))
    assert (question.metric, question.max_new_tokens, question.chance) == ("f1", 128, 0)


def test_longbench_has_its_sixteen_english_data_sets_with_the_question_after_the_context() -> None:
    assert len(FORMATS) == 16
    assert len(LongBench.datasets) == 16 + 13
    for prompt_format in FORMATS.values():
        assert prompt_format.context_template.endswith("{context}")
        assert "{input}" not in prompt_format.context_template
        assert prompt_format.metric in METRICS


def test_every_longbench_data_set_makes_prompts() -> None:
    for name in LongBench.datasets:
        prompt = LongBench(name).prompt(longbench_row())
        assert "A text by Ada." in prompt.context
        assert "{" not in prompt.context + prompt.questions[0].text


def test_template_placeholders_in_a_row_stay_as_they_are() -> None:
    prompt = LongBench("qasper").prompt(longbench_row(context="{input}", input="{context} {0}"))
    assert prompt.context.endswith("Article: {input}")
    assert prompt.questions[0].text.endswith("Question: {context} {0}\n\nAnswer:")


def test_chance_is_set_if_the_answers_are_known_beforehand() -> None:
    trec = longbench_row(input="Question: Who?\nType:", answers=["City"], all_classes=["Food", "City"])
    (question,) = LongBench("trec").prompt(trec).questions
    assert (question.choices, question.chance, question.target) == (("Food", "City"), 0.5, " City")
    (question,) = LongBench("passage_retrieval_en").prompt(longbench_row(answers=["Paragraph 3"])).questions
    assert (question.chance, question.target) == (1 / 30, "Paragraph 3")  # the prompt ends in a space already


def test_longbench_v2_strips_and_chooses(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "data.json", [v2_row()])
    (prompt,) = load_prompts(f"longbench_v2={file}", 1, tokens=MAX_TOKENS, tokenizer=Words())
    (question,) = prompt.questions
    assert prompt.context.endswith("\n\n<text>\nIt was Bob.")
    assert question.text == (
        "\n</text>\n\nWhat is the correct answer to this question: Who?\nChoices:\n(A) Ada\n(B) Bob\n(C) Cy\n(D) Di\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert question.target == " The correct answer is (B)"
    assert (question.answers, question.chance, question.max_new_tokens) == (("B",), 0.25, 128)
    assert METRICS[question.metric](question.target, question) == 1


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_ruler_takes_the_rows_of_its_task_and_joins_questions_of_one_context(tmp_path: Path, ending: str) -> None:
    other = ruler_row(task="qa_1", context="Documents", answer=["Ada", "Lady Ada"], max_new_tokens=32)
    again = ruler_row(question="What are all the special magic numbers for dog?", answer=["9"])
    file = write_rows(tmp_path / f"test.{ending}", [other, ruler_row(), again, ruler_row(context="Another.\n")])
    prompts = load_prompts(f"ruler:niah_multivalue@4096={file}", 9, tokens=MAX_TOKENS, tokenizer=Words())
    assert [prompt.name for prompt in prompts] == ["ruler:niah_multivalue@4096:0", "ruler:niah_multivalue@4096:1"]
    first, second = prompts[0].questions
    assert prompts[0].context == ruler_row()["context"]
    assert first.text == ruler_row()["question"] + ruler_row()["answer_prefix"]
    assert (first.target, first.answers, first.metric, first.max_new_tokens) == (" 7, 8", ("7", "8"), "recall", 128)
    assert second.answers == ("9",)
    (qa,) = load_prompts(f"ruler:qa_1={file}", 9, tokens=MAX_TOKENS, tokenizer=Words())[0].questions
    assert (qa.target, qa.metric, qa.max_new_tokens) == (" Ada", "contains_any", 32)


def test_no_more_prompts_are_loaded_than_requested(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "q.jsonl", [longbench_row(context=f"Text {number}.") for number in range(5)])
    assert len(load_prompts(f"longbench:qasper={file}", 3, tokens=MAX_TOKENS, tokenizer=Words())) == 3
    assert len(load_prompts(f"longbench:qasper={file}", 9, tokens=MAX_TOKENS, tokenizer=Words())) == 5


def test_a_question_that_is_in_its_context_is_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    known = longbench_row(context="Question: Who?\nType: City", input="Question: Who?\nType:", all_classes=["City"])
    new = longbench_row(context="Question: Who?\nType: City", input="Question: When?\nType:", all_classes=["City"])
    file = write_rows(tmp_path / "trec.jsonl", [known, new])
    (prompt,) = load_prompts(f"longbench:trec={file}", 2, tokens=MAX_TOKENS, tokenizer=Words())
    assert [question.text for question in prompt.questions] == ["\nQuestion: When?\nType:"]
    assert "left out 1 of 2 questions" in capfd.readouterr().err
    file = write_rows(tmp_path / "known.jsonl", [known])
    with pytest.raises(UserError, match="has no row that could be asked"):
        load_prompts(f"longbench:trec={file}", 2, tokens=MAX_TOKENS, tokenizer=Words())


@given(words=st.integers(1, 400), tokens=st.integers(250, 700))
def test_a_long_context_keeps_both_ends_and_fits(words: int, tokens: int) -> None:
    context = " ".join(f"w{number}" for number in range(words))
    tokenizer = Words()
    row = longbench_row(context=context)
    prompt = fit_prompt(LongBench("hotpotqa"), [row], tokens=tokens, tokenizer=tokenizer)
    assert prompt is not None
    length = prompt.num_tokens(lambda text: len(tokenizer.encode(text)))
    assert length <= tokens
    whole = LongBench("hotpotqa").prompt(row)
    assert prompt.questions == whole.questions
    kept = prompt.context.removeprefix(whole.context.removesuffix(context))
    if kept != context:
        first, last = kept.split("w")[1], kept.split("w")[-1]
        assert (first, last) == ("0 ", str(words - 1))
        assert length >= tokens - 2  # halves of one size, and one word that joins at the cut


def test_a_context_that_cannot_fit_is_rejected() -> None:
    row = longbench_row(context="word " * 100)
    with pytest.raises(
        UserError, match=r"longbench:hotpotqa leaves no tokens for its context in 60 tokens; allow more"
    ):
        fit_prompt(LongBench("hotpotqa"), [row], tokens=60, tokenizer=Words())


def test_ruler_is_never_truncated() -> None:
    with pytest.raises(UserError, match=r"ruler:niah_multivalue has \d+ tokens, more than 50, and truncation"):
        fit_prompt(Ruler("niah_multivalue"), [ruler_row()], tokens=50, tokenizer=Words())


@pytest.mark.demo
def test_a_prompt_fits_with_a_real_tokenizer(demo: LoadedModel, tmp_path: Path) -> None:
    context = "".join(f"Sentence {number} says «naïve» 日本 things.\n" for number in range(400))
    file = write_rows(tmp_path / "q.jsonl", [longbench_row(context=context)])
    (prompt,) = load_prompts(f"longbench:qasper={file}", 1, tokens=1000, tokenizer=demo.tokenizer)
    length = prompt.num_tokens(lambda text: len(demo.tokenizer.encode(text)))
    assert 980 <= length <= 1000
    assert "Sentence 0 says" in prompt.context
    assert prompt.context.endswith("Sentence 399 says «naïve» 日本 things.\n")


def test_a_file_is_read_out_of_an_archive_as_the_published_one_is(tmp_path: Path) -> None:
    # LongBench's own archive has all data sets as data/NAME.jsonl
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", json.dumps(longbench_row()) + "\n")
        archive.writestr("data/trec.jsonl", json.dumps(longbench_row(input="other")) + "\n")
    inner, _, hub = LongBench("qasper").published_files.partition("::")
    assert hub.startswith("hf://datasets/")
    (row,) = stream_file_rows("rows", "fix it", files=f"{inner}::{tmp_path / 'data.zip'}", where={})
    assert row["input"] == "Who wrote it?"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("scrolls:qasper", r"unknown suite 'scrolls'; choose one of longbench, longbench_v2, ruler\."),
        ("longbench:quasper", r"no data set 'quasper'; choose one of narrativeqa, qasper, .*repobench-p"),
        ("longbench", r"no data set ''; choose one of narrativeqa"),
        ("longbench:lsht", r"no data set 'lsht'; .*the Chinese data sets are left out"),
        ("longbench:musique_e", r"no data set 'musique_e'"),
        ("longbench:qasper@4096", r"no length '4096'; leave it out"),
        ("longbench_v2:qa", r"longbench_v2 has no data set 'qa'; leave it out"),
        ("ruler:vt@5000", r"no length '5000'; choose one of 4096, 8192, 16384"),
        ("ruler:vt", r"several lengths; choose one as ruler:vt@4096"),
        ("longbench:qasper=missing.jsonl", r"data file 'missing.jsonl' does not exist"),
        (
            "longbench:qasper=rows.csv",
            r"data file 'rows.csv' ends in '.csv'; it must be one of .json, .jsonl, .parquet",
        ),
        ("longbench:qasper", r"suite longbench:qasper \(zip://.*\) could not be read .*longbench:qasper=FILE"),
        ("longbench_v2", r"suite longbench_v2 \(hf://.*\) could not be read .*connect to the hub"),
        ("ruler:vt@4096", r"suite ruler:vt@4096 \(hf://.*/4096/.*\) could not be read"),
    ],
)
def test_an_unreadable_suite_is_one_sentence(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        load_prompts(spec, 1, tokens=MAX_TOKENS, tokenizer=Words())
    assert "\n" not in str(refused.value)


def test_rows_without_a_column_are_rejected(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "q.jsonl", [{"context": "c", "input": "i"}])
    with pytest.raises(UserError, match=r"has nothing in column 'answers' of a row with 'context', 'input'"):
        load_prompts(f"longbench:qasper={file}", 1, tokens=MAX_TOKENS, tokenizer=Words())
    (tmp_path / "bad.jsonl").write_text("no json")
    with pytest.raises(UserError, match=r"could not be read"):
        load_prompts(f"longbench:qasper={tmp_path / 'bad.jsonl'}", 1, tokens=MAX_TOKENS, tokenizer=Words())


def test_a_label_is_parsed_back_into_its_suite() -> None:
    for spec in ("longbench:qasper", "longbench_v2", "ruler:vt@8192"):
        suite, file = parse_suite_spec(spec)
        assert (suite.label, file, type(suite)) == (spec, "", SUITES[suite.name])
    assert parse_suite_spec("ruler:vt=a=b.jsonl")[1] == "a=b.jsonl"


def test_rows_of_a_users_file_are_checked(tmp_path: Path) -> None:
    row = {"context": "A text of London.", "input": "Where?", "answers": "London"}
    (prompt,) = load_prompts(
        f"longbench:qasper={write_rows(tmp_path / 'a.jsonl', [row])}", 1, tokens=MAX_TOKENS, tokenizer=Words()
    )
    assert prompt.questions[0].answers == ("London",)
    for name, answers in (("b", [""]), ("c", {"text": "London"}), ("d", [5])):
        file = write_rows(tmp_path / f"{name}.jsonl", [row | {"answers": answers}])
        with pytest.raises(UserError, match="neither text nor a list of texts"):
            load_prompts(f"longbench:qasper={file}", 1, tokens=MAX_TOKENS, tokenizer=Words())
