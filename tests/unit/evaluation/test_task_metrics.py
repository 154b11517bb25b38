"""Metrics: values computed by hand, and cases that the published definitions decide."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baklava.evaluation.tasks.base import Question
from baklava.evaluation.tasks.metrics import METRICS


def score(metric: str, generated: str, *answers: str, choices: tuple[str, ...] = ()) -> float:
    return METRICS[metric](generated, Question("", answers[0], answers, metric=metric, choices=choices))


def test_recall_is_a_share_of_the_answers_and_contains_any_needs_one() -> None:
    assert score("recall", "It is Paris or ROME.", "paris", "Rome", "Oslo", "Bonn") == 0.5
    assert score("contains_any", "It is Paris or ROME.", "Oslo", "rome") == 1.0
    assert score("contains_any", "It is Paris.", "Oslo", "Rome") == 0.0


@pytest.mark.parametrize(
    ("generated", "answers", "expected"),
    [
        ("The cat sat on a mat.", ("cat on the mat",), 6 / 7),  # of cat sat on mat and cat on mat, 3 are the same
        ("cat cat dog", ("cat",), 1 / 2),  # words count as often as both have them: 1 of 3 and 1 of 1
        ("no idea", ("cat", "no"), 2 / 3),  # the best answer counts
        ("U.S.A.", ("USA",), 1.0),  # punctuation goes without leaving a space
        ("the", ("the",), 0.0),  # an article alone is nothing
        ("", ("cat",), 0.0),
    ],
)
def test_f1_counts_plain_words(generated: str, answers: tuple[str, ...], expected: float) -> None:
    assert score("f1", generated, *answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("generated", "answers", "expected"),
    [
        # the example of the ROUGE notes: w1 w2 and w1 w3 w5 together are 4 of 5 words, and of 8 different ones given
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", ("w1 w2 w3 w4 w5",), 2 * 4 / 8 * 4 / 5 / (4 / 8 + 4 / 5)),
        ("a b c", ("c b a",), 1 / 3),
        ("a a a b", ("a b",), 1.0),  # words count once
        ("The cat", ("the cat",), 1 / 2),  # case counts
        ("a b. ", ("a b",), 2 * (2 / 3) / (2 / 3 + 1)),  # white space after the last full stop is an empty word
        ("x", ("a", "x"), 1.0),
        ("...", ("a",), 0.0),
        ("", ("a",), 0.0),
    ],
)
def test_rouge_l_is_the_union_of_common_subsequences(generated: str, answers: tuple[str, ...], expected: float) -> None:
    assert score("rouge_l", generated, *answers) == pytest.approx(expected, abs=1e-7)


def test_rouge_l_scores_a_long_sentence() -> None:
    words = " ".join(f"w{number}" for number in range(700))
    assert score("rouge_l", words, words) == pytest.approx(1, abs=1e-7)


def test_few_shot_answers_are_read_from_the_first_line() -> None:
    assert score("first_line_f1", "\n\nBonn\nPassage: Oslo", "Bonn") == 1.0
    assert score("f1", "\n\nBonn\nPassage: Oslo", "Bonn") == 0.5
    assert score("first_line_rouge_l", "a b\nc d", "a b") == pytest.approx(1, abs=1e-7)


KINDS = ("Food", "City", "Other location", "location", "Animal")


@pytest.mark.parametrize(
    ("generated", "answer", "expected"),
    [
        (" City", "City", 1.0),
        ("City or Food", "City", 1 / 2),
        ("Other location", "Other location", 1.0),  # "location" is a part of the answer's name
        ("Other location", "location", 1 / 2),  # but a longer name is another answer
        ("Food\nCity", "City", 0.0),
        ("city", "City", 0.0),
        ("", "City", 0.0),
    ],
)
def test_classification_shares_between_the_choices_named(generated: str, answer: str, expected: float) -> None:
    assert score("classification", generated, answer, choices=KINDS) == expected


def test_retrieval_and_count_share_between_the_numbers_named() -> None:
    assert score("retrieval", "Paragraph 12 or 3, no, 12", "Paragraph 12") == pytest.approx(2 / 3)
    assert score("retrieval", "Paragraph 121", "Paragraph 12") == 0.0
    assert score("count", "17 of 20", "17") == 0.5
    assert score("count", "seventeen", "17") == 0.0


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ("return a", 1.0),
        ("\n```python\n# comment\nreturn a\nreturn b", 1.0),
        ("return b", 0.88),  # 2 x 7 of 16 letters, .875, in hundredths
        ("# only a comment", 0.0),
        ("", 0.0),
    ],
)
def test_code_similarity_is_that_of_the_first_line_of_code(generated: str, expected: float) -> None:
    assert score("code_similarity", generated, "return a") == expected


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ("The correct answer is (B).", 1.0),
        ("**The correct answer is B**", 1.0),
        ("The correct answer is A, though elsewhere: The correct answer is (B)", 1.0),  # brackets come first
        ("The correct answer is (A)", 0.0),
        ("(B)", 0.0),
        ("the correct answer is (B)", 0.0),
    ],
)
def test_choice_reads_the_letter_of_the_sentence(generated: str, expected: float) -> None:
    assert score("choice", generated, "B") == expected


@given(
    st.sampled_from(sorted(METRICS)),
    st.text("ab1. \n#A", max_size=30),
    st.lists(st.sampled_from(["a", "b a", "Paragraph 1", "A", "1. b"]), min_size=1),
)
def test_every_metric_is_between_0_and_1_whatever_is_generated(metric: str, generated: str, answers: list[str]) -> None:
    numbered = [answer for answer in answers if "1" in answer] or ["1"]  # what retrieval's answers always have
    assert 0 <= score(metric, generated, *numbered, choices=("a", "1")) <= 1
