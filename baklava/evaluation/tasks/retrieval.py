"""Retrieval: find numbers, pairs, sentences or chains of variables in a long context.

The needle tasks are worded as in RULER (arXiv 2404.06654): sentences that assign a number to a key.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import ClassVar

from typing_extensions import override

from baklava.evaluation.tasks.base import FillerText, Prompt, Question, Task, random_keys, random_number, random_words

NEEDLE_DIGITS = 7
PAIR_DIGITS = 5
VARIABLE_DIGITS = 5

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")


def guess_chance(digits: int) -> float:
    """Return the chance of guessing a number with this many digits."""
    return 1 / (9 * 10 ** (digits - 1))


def noise_sentences(size: int) -> list[str]:
    """Return the same five sentences `size` times."""
    return [" ".join(NOISE)] * size


def insert_sentences(haystack: Sequence[str], sentences: Sequence[str], rng: Random) -> str:
    """Insert sentences into a haystack at random places, in their order."""
    places = sorted(rng.choices(range(len(haystack) + 1), k=len(sentences)))
    mixed = list(haystack)
    for place, sentence in reversed(list(zip(places, sentences, strict=True))):
        mixed.insert(place, sentence)
    return " ".join(mixed)


@dataclass(frozen=True)
class Needle:
    """A key and one of its numbers."""

    key: str
    value: str

    @property
    def sentence(self) -> str:
        """The sentence that is hidden in the haystack."""
        return f"One of the special magic numbers for {self.key} is: {self.value}."


def random_needles(count: int, rng: Random) -> list[Needle]:
    """Return needles with distinct keys."""
    return [Needle(key, random_number(NEEDLE_DIGITS, rng)) for key in random_keys(count, rng)]


def needle_prompt(
    name: str, haystack: Sequence[str], needles: Sequence[Needle], questions: Sequence[Question], rng: Random
) -> Prompt:
    """Build a prompt that announces its needles without saying which of them will be asked for."""
    text = insert_sentences(haystack, [needle.sentence for needle in needles], rng)
    head = "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    return Prompt(name, f"{head}I will quiz you about the numbers afterwards.\n{text}", tuple(questions))


def ask_for_value(needle: Needle) -> Question:
    """Ask for the only number of a key."""
    question = f"What is the special magic number for {needle.key} mentioned in the provided text?"
    lead = f"The special magic number for {needle.key} mentioned in the provided text is"
    chance = guess_chance(NEEDLE_DIGITS)
    return Question(f"\n{question} {lead}", f" {needle.value}", (needle.value,), chance)


def ask_for_values(subject: str, needles: Sequence[Needle]) -> Question:
    """Ask for several numbers at once; the answer may have them in any order."""
    question = f"What are all the special magic numbers for {subject} mentioned in the provided text?"
    lead = f"The special magic numbers for {subject} mentioned in the provided text are"
    values = tuple(needle.value for needle in needles)
    return Question(
        f"\n{question} {lead}",
        f" {', '.join(values[:-1])}, and {values[-1]}",
        values,
        chance=guess_chance(NEEDLE_DIGITS),
        metric="recall",
        max_new_tokens=10 * len(values),
    )


@dataclass(frozen=True)
class Passkey(Task):
    """One number among five sentences that repeat (RULER's niah_single_1).

    Easy for eviction by attention, since only the number differs from the rest: compare it with `needle`.
    """

    name: ClassVar[str] = "passkey"

    @override
    def build(self, filler: FillerText, size: int, rng: Random) -> Prompt:
        (needle,) = random_needles(1, rng)
        return needle_prompt(self.name, noise_sentences(size), [needle], [ask_for_value(needle)], rng)


@dataclass(frozen=True)
class SingleNeedle(Task):
    """One number in prose (RULER's niah_single_2)."""

    name: ClassVar[str] = "needle"

    @override
    def build(self, filler: FillerText, size: int, rng: Random) -> Prompt:
        (needle,) = random_needles(1, rng)
        return needle_prompt(self.name, filler.passage(size, rng), [needle], [ask_for_value(needle)], rng)


@dataclass(frozen=True)
class MultiNeedle(Task):
    """Numbers of several keys in prose, each asked for in a question of its own (RULER's niah_multikey_1)."""

    name: ClassVar[str] = "multi_needle"
    keys: int = 4

    @override
    def build(self, filler: FillerText, size: int, rng: Random) -> Prompt:
        needles = random_needles(self.keys, rng)
        questions = [ask_for_value(needle) for needle in needles]
        return needle_prompt(self.name, filler.passage(size, rng), needles, questions, rng)


@dataclass(frozen=True)
class MultiQuery(Task):
    """Numbers of several keys in prose, asked for in one question (RULER's niah_multiquery)."""

    name: ClassVar[str] = "multi_query"
    queries: int = 4

    @override
    def build(self, filler: FillerText, size: int, rng: Random) -> Prompt:
        needles = random_needles(self.queries, rng)
        keys = [needle.key for needle in rng.sample(needles, len(needles))]
        in_order_of_keys = sorted(needles, key=lambda needle: keys.index(needle.key))
        question = ask_for_values(f"{', '.join(keys[:-1])}, and {keys[-1]}", in_order_of_keys)
        return needle_prompt(self.name, filler.passage(size, rng), needles, [question], rng)


@dataclass(frozen=True)
class MultiValue(Task):
    """All numbers of one key, spread over prose (RULER's niah_multivalue)."""

    name: ClassVar[str] = "multi_value"
    values: int = 4

    @override
    def build(self, filler: FillerText, size: int, rng: Random) -> Prompt:
        (key,) = random_keys(1, rng)
        needles = [Needle(key, random_number(NEEDLE_DIGITS, rng)) for _ in range(self.values)]
        return needle_prompt(self.name, filler.passage(size, rng), needles, [ask_for_values(key, needles)], rng)


@dataclass(frozen=True)
class KeyValueRetrieval(Task):
    """Values of some keys in a list of pairs (as in "Lost in the middle", arXiv 2307.03172, with words as keys).

    Hardest for eviction: the list has no filler, and no pair looks more important than the others before the question.
    """

    name: ClassVar[str] = "kv_retrieval"
    queries: int = 10

    @override
    def build(self, filler: FillerText, size: int, rng: Random) -> Prompt:
        count = max(size, self.queries)
        keys = rng.sample(filler.words, count) if count <= len(filler.words) else random_keys(count, rng)
        pairs = [(key, random_number(PAIR_DIGITS, rng)) for key in keys]
        lines = "\n".join(f"{key}: {value}" for key, value in pairs)
        questions = [
            Question(
                f"\n\nRepeat from the list above:\n{key}:", f" {value}", (value,), chance=guess_chance(PAIR_DIGITS)
            )
            for key, value in rng.sample(pairs, self.queries)
        ]
        return Prompt(self.name, f"Memorize this list of keys and their values.\n{lines}", tuple(questions))


@dataclass(frozen=True)
class VariableTracking(Task):
    """A chain of assignments in noise, all of whose variables are asked for (RULER's variable_tracking)."""

    name: ClassVar[str] = "variable_tracking"
    hops: int = 4

    @override
    def build(self, filler: FillerText, size: int, rng: Random) -> Prompt:
        names = [word.upper() for word in random_words(self.hops + 1, 5, rng)]
        value = random_number(VARIABLE_DIGITS, rng)
        chain = [f"VAR {names[0]} = {value}."]
        chain += [f"VAR {later} = VAR {earlier}." for earlier, later in pairwise(names)]
        head = "Memorize and track the chain(s) of variable assignment hidden in the following text."
        context = f"{head}\n\n{insert_sentences(noise_sentences(size), chain, rng)}"
        question = f"Question: Find all variables that are assigned the value {value} in the text above."
        lead = f"Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are"
        return Prompt(
            self.name,
            context,
            (
                Question(
                    f"\n{question} {lead} assigned the value {value}, they are:",
                    f" {', '.join(names)}",
                    tuple(names),
                    metric="recall",
                    max_new_tokens=6 * len(names),
                ),
            ),
        )


COPY_LEAD_WORDS = 5
"""Words of the sentence that the question gives."""

COPIED_WORDS = 8
"""Words that the model has to continue with."""


@dataclass(frozen=True)
class Copy(Task):
    """The continuation of sentences of the context, word for word, from their first words."""

    name: ClassVar[str] = "copy"
    queries: int = 4

    @override
    def build(self, filler: FillerText, size: int, rng: Random) -> Prompt:
        passage = filler.passage(size, rng)
        sentences = [sentence.split() for sentence in passage]
        leads = Counter(tuple(words[:COPY_LEAD_WORDS]) for words in sentences)
        min_words = COPY_LEAD_WORDS + COPIED_WORDS
        usable = [
            words for words in sentences if len(words) >= min_words and leads[tuple(words[:COPY_LEAD_WORDS])] == 1
        ]
        questions = []
        for words in rng.sample(usable, min(self.queries, len(usable))):
            lead = " ".join(words[:COPY_LEAD_WORDS])
            rest = " ".join(words[COPY_LEAD_WORDS:min_words])
            # The lead stands here only once: after quoting it first, the model would copy what follows the quotation.
            questions.append(Question(f"\n\nOnce more, word for word:\n{lead}", f" {rest}", (rest,)))
        return Prompt(self.name, " ".join(passage), tuple(questions))
