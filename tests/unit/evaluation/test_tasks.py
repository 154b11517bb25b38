"""Facts about every task: made from a seed, as long as asked for, answerable from its context alone."""

import re
from random import Random

import pytest

from baklava.data.documents import Document
from baklava.errors import UserError
from baklava.evaluation.tasks import TASKS, Prompt, Prose, Question, Task, prompts, task_of
from baklava.evaluation.tasks.metrics import METRICS
from baklava.evaluation.tasks.word_lists import ADJECTIVES, NOUNS, coded, keys

LETTERS = "abcdefghijklmnopqrstuvwxyz"
GENERATED = ("multi_value", "multi_query", "variable_tracking", "common_words", "frequent_words")
LITERAL = ("passkey", "needle", "multi_needle", "kv_retrieval", "copy", "multi_value", "multi_query")


@pytest.fixture(scope="module")
def prose() -> Prose:
    draw = Random(0)
    words = ["".join(draw.choices(LETTERS, k=6)) for _ in range(900)]
    sentences = [f"The {' '.join(draw.sample(words, 16))}." for _ in range(600)]
    return Prose.of([Document("d", " ".join(sentences))])


def count(text: str) -> int:
    """A tokenizer of words and marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def made(name: str, prose: Prose, tokens: int = 1024, seed: int = 0, number: int = 2) -> list[Prompt]:
    return prompts(TASKS[name](), prose, number, tokens=tokens, seed=seed, length=count)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("tokens", [1024, 2000, 8192])
def test_a_prompt_is_as_long_as_fits(name: str, tokens: int, prose: Prose) -> None:
    (prompt,) = made(name, prose, tokens, number=1)
    assert 0.93 * tokens < prompt.length(count) <= tokens


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_gives_the_same_prompts_and_another_seed_others(name: str, prose: Prose) -> None:
    assert made(name, prose) == made(name, prose)
    first, second = made(name, prose)
    assert (first.name, second.name) == (f"{name}:0", f"{name}:1")
    assert first.context != second.context
    assert made(name, prose, seed=1)[0].context != first.context


@pytest.mark.parametrize("name", TASKS)
def test_no_question_is_in_the_context(name: str, prose: Prose) -> None:
    for prompt in made(name, prose):
        assert prompt.questions
        for question in prompt.questions:
            assert question.text.strip() not in prompt.context
            assert question.target.strip() not in question.text


@pytest.mark.parametrize("name", LITERAL)
def test_the_context_holds_the_answers_and_nothing_else_does(name: str, prose: Prose) -> None:
    for prompt in made(name, prose):
        for question in prompt.questions:
            for answer in question.answers:
                assert prompt.context.count(answer) == 1
                assert answer not in question.text


@pytest.mark.parametrize("name", TASKS)
def test_a_question_says_how_it_is_scored_and_what_a_guess_would_score(name: str, prose: Prose) -> None:
    for question in made(name, prose)[0].questions:
        assert 0 <= question.chance <= 0.25
        assert (question.metric in METRICS) == (name in GENERATED)
        assert (question.tokens > 0) == (name in GENERATED)
        if name in GENERATED:
            assert METRICS[question.metric](question.target, question) == 1.0
            assert METRICS[question.metric]("I do not know.", question) == 0.0


def test_every_pair_of_a_list_can_be_asked_for(prose: Prose) -> None:
    first, second = made("kv_retrieval", prose)
    pairs = dict(line.split(": ") for line in first.context.splitlines()[1:])
    for question in first.questions:
        key = question.text.rsplit("\n", 1)[1].rstrip(":")
        assert pairs[key] == question.target.strip()
    assert len(first.questions) == len({q.text for q in first.questions}) == 10
    assert first.questions != second.questions


def test_a_chain_of_variables_ends_in_its_value(prose: Prose) -> None:
    (question,) = made("variable_tracking", prose)[0].questions
    context = made("variable_tracking", prose)[0].context
    first, *later = question.answers
    value = re.search(r"assigned the value (\d+) in", question.text)
    assert value is not None
    assert f"VAR {first} = {value.group(1)}." in context
    for earlier, name in zip(question.answers, later, strict=False):
        assert f"VAR {name} = VAR {earlier}." in context


def test_the_common_words_are_ten_times_as_common(prose: Prose) -> None:
    prompt = made("common_words", prose)[0]
    words = re.findall(r"\d+\. (\w+)", prompt.context)
    counts = {word: words.count(word) for word in words}
    top = sorted(counts, key=lambda word: -counts[word])[:10]
    assert set(top) == set(prompt.questions[0].answers)
    assert {counts[word] for word in top} == {10}
    assert max(count for word, count in counts.items() if word not in top) == 1


def test_the_frequent_words_follow_the_dots(prose: Prose) -> None:
    prompt = made("frequent_words", prose)[0]
    words = prompt.context.split("\n", 1)[1].split()
    order = sorted(set(words), key=words.count, reverse=True)
    assert order[0] == "..."
    assert tuple(order[1:4]) == prompt.questions[0].answers
    assert words.count(order[3]) > words.count(order[4])


def test_no_word_that_is_classified_was_shown(prose: Prose) -> None:
    prompt = made("few_shot", prose)[0]
    assert {question.target for question in prompt.questions} <= {" animal", " food", " tool", " country"}
    for question in prompt.questions:
        assert f"Word: {question.text.split()[1]}\n" not in prompt.context


def test_names_go_on_beyond_all_pairs_of_words() -> None:
    many = keys(len(ADJECTIVES) * len(NOUNS) + 50, Random(0))
    assert len(set(many)) == len(many)
    assert any(name.endswith("-1") for name in many)
    assert len(set(coded(300, 4, Random(0)))) == 300


def test_prose_is_sentences_without_markup() -> None:
    text = (
        "# A heading\n\nThe cat sat on the mat. Was it red? | a | table |\n- a list\nIt was *very* red.\nToo short.\n"
    )
    assert Prose.of([Document("d", text)]).sentences == ("The cat sat on the mat.",)
    with pytest.raises(UserError, match="no sentence"):
        Prose.of([Document("d", "# only\n- a list")])


def test_a_passage_goes_round_a_short_text() -> None:
    prose = Prose(("One two three four.", "Five six seven eight."))
    assert len(prose.passage(5, Random(0))) == 5


@pytest.mark.parametrize(("asked", "reason"), [("What is it?", "in its context"), ("", "has no text")])
def test_a_question_that_eviction_would_see_is_refused(asked: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Prompt("p", "A long text. What is it? More text.", (Question(asked, " a thing"),))


def test_too_little_room_is_refused_in_a_sentence(prose: Prose) -> None:
    for name in TASKS:
        with pytest.raises(UserError, match=r"tokens"):
            made(name, prose, tokens=8)


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"choose from passkey, needle.*or all"):
        task_of("qa")
    assert issubclass(task_of("needle"), Task)
