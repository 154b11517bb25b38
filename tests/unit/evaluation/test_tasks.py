"""Every task: built from a seed, as long as requested, answerable from its context alone."""

import re
from random import Random

import pytest

from baklava.data.documents import Document
from baklava.errors import UserError
from baklava.evaluation.tasks import TASKS, FillerText, Prompt, Question, Task, build_prompts, task_class
from baklava.evaluation.tasks.base import ADJECTIVES, NOUNS, random_keys, random_words
from baklava.evaluation.tasks.metrics import METRICS

LETTERS = "abcdefghijklmnopqrstuvwxyz"
GENERATED = ("multi_value", "multi_query", "variable_tracking", "common_words", "frequent_words")
LITERAL = ("passkey", "needle", "multi_needle", "kv_retrieval", "copy", "multi_value", "multi_query")


@pytest.fixture(scope="module")
def filler() -> FillerText:
    rng = Random(0)
    words = ["".join(rng.choices(LETTERS, k=6)) for _ in range(900)]
    sentences = [f"The {' '.join(rng.sample(words, 16))}." for _ in range(600)]
    return FillerText.from_documents([Document("d", " ".join(sentences))])


def count_tokens(text: str) -> int:
    """A tokenizer of words and marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def build(name: str, filler: FillerText, tokens: int = 1024, seed: int = 0, number: int = 2) -> list[Prompt]:
    return build_prompts(TASKS[name](), filler, number, tokens=tokens, seed=seed, count_tokens=count_tokens)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("tokens", [1024, 2000, 8192])
def test_a_prompt_is_the_longest_that_fits(name: str, tokens: int, filler: FillerText) -> None:
    (prompt,) = build(name, filler, tokens, number=1)
    assert 0.93 * tokens < prompt.num_tokens(count_tokens) <= tokens


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_gives_the_same_prompts_and_another_seed_others(name: str, filler: FillerText) -> None:
    assert build(name, filler) == build(name, filler)
    first, second = build(name, filler)
    assert (first.name, second.name) == (f"{name}:0", f"{name}:1")
    assert first.context != second.context
    assert build(name, filler, seed=1)[0].context != first.context


@pytest.mark.parametrize("name", TASKS)
def test_no_question_is_in_the_context(name: str, filler: FillerText) -> None:
    for prompt in build(name, filler):
        assert prompt.questions
        for question in prompt.questions:
            assert question.text.strip() not in prompt.context
            assert question.target.strip() not in question.text


@pytest.mark.parametrize("name", LITERAL)
def test_only_the_context_has_the_answers(name: str, filler: FillerText) -> None:
    for prompt in build(name, filler):
        for question in prompt.questions:
            for answer in question.answers:
                assert prompt.context.count(answer) == 1
                assert answer not in question.text


@pytest.mark.parametrize("name", TASKS)
def test_a_question_has_a_metric_and_the_chance_of_a_guess(name: str, filler: FillerText) -> None:
    for question in build(name, filler)[0].questions:
        assert 0 <= question.chance <= 0.25
        assert (question.metric in METRICS) == (name in GENERATED)
        assert (question.max_new_tokens > 0) == (name in GENERATED)
        if name in GENERATED:
            assert METRICS[question.metric](question.target, question) == 1.0
            assert METRICS[question.metric]("I do not know.", question) == 0.0


def test_every_pair_of_a_list_can_be_asked_for(filler: FillerText) -> None:
    first, second = build("kv_retrieval", filler)
    pairs = dict(line.split(": ") for line in first.context.splitlines()[1:])
    for question in first.questions:
        key = question.text.rsplit("\n", 1)[1].rstrip(":")
        assert pairs[key] == question.target.strip()
    assert len(first.questions) == len({q.text for q in first.questions}) == 10
    assert first.questions != second.questions


def test_a_chain_of_variables_ends_in_its_value(filler: FillerText) -> None:
    (question,) = build("variable_tracking", filler)[0].questions
    context = build("variable_tracking", filler)[0].context
    first, *later = question.answers
    value = re.search(r"assigned the value (\d+) in", question.text)
    assert value is not None
    assert f"VAR {first} = {value.group(1)}." in context
    for earlier, name in zip(question.answers, later, strict=False):
        assert f"VAR {name} = VAR {earlier}." in context


def test_the_common_words_are_ten_times_as_common(filler: FillerText) -> None:
    prompt = build("common_words", filler)[0]
    words = re.findall(r"\d+\. (\w+)", prompt.context)
    counts = {word: words.count(word) for word in words}
    top = sorted(counts, key=lambda word: -counts[word])[:10]
    assert set(top) == set(prompt.questions[0].answers)
    assert {counts[word] for word in top} == {10}
    assert max(count for word, count in counts.items() if word not in top) == 1


def test_the_frequent_words_follow_the_dots(filler: FillerText) -> None:
    prompt = build("frequent_words", filler)[0]
    words = prompt.context.split("\n", 1)[1].split()
    order = sorted(set(words), key=words.count, reverse=True)
    assert order[0] == "..."
    assert tuple(order[1:4]) == prompt.questions[0].answers
    assert words.count(order[3]) > words.count(order[4])


def test_no_classified_word_is_among_the_shots(filler: FillerText) -> None:
    prompt = build("few_shot", filler)[0]
    assert {question.target for question in prompt.questions} <= {" animal", " food", " tool", " country"}
    for question in prompt.questions:
        assert f"Word: {question.text.split()[1]}\n" not in prompt.context


def test_keys_are_distinct_beyond_all_pairs_of_words() -> None:
    names = random_keys(len(ADJECTIVES) * len(NOUNS) + 50, Random(0))
    assert len(set(names)) == len(names)
    assert any(name.endswith("-1") for name in names)
    assert len(set(random_words(300, 4, Random(0)))) == 300


def test_filler_text_is_sentences_without_markup() -> None:
    text = (
        "# A heading\n\nThe cat sat on the mat. Was it red? | a | table |\n- a list\nIt was *very* red.\nToo short.\n"
    )
    assert FillerText.from_documents([Document("d", text)]).sentences == ("The cat sat on the mat.",)
    with pytest.raises(UserError, match="no sentence"):
        FillerText.from_documents([Document("d", "# only\n- a list")])


def test_a_passage_wraps_around_a_short_text() -> None:
    filler = FillerText(("One two three four.", "Five six seven eight."))
    assert len(filler.passage(5, Random(0))) == 5


@pytest.mark.parametrize(("asked", "reason"), [("What is it?", "in its context"), ("", "has no text")])
def test_a_question_that_eviction_would_see_is_rejected(asked: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Prompt("p", "A long text. What is it? More text.", (Question(asked, " a thing"),))


def test_a_length_that_is_too_short_is_one_sentence(filler: FillerText) -> None:
    for name in TASKS:
        with pytest.raises(UserError, match=r"tokens"):
            build(name, filler, tokens=8)


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"choose from passkey, needle.*or all"):
        task_class("qa")
    assert issubclass(task_class("needle"), Task)
