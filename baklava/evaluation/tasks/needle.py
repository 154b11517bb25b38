"""Needles in a haystack, as RULER (arXiv 2404.06654) words them: sentences that give a key its number."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from typing_extensions import override

from baklava.evaluation.tasks.base import Prompt, Question, Task
from baklava.evaluation.tasks.filler_text import Prose
from baklava.evaluation.tasks.word_lists import keys, number

DIGITS = 7
CHANCE = 1 / (9 * 10 ** (DIGITS - 1))
"""Of guessing a number of that many digits."""

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")


@dataclass(frozen=True)
class Needle:
    """A key and one of its numbers."""

    key: str
    value: str

    @property
    def sentence(self) -> str:
        """What is hidden."""
        return f"One of the special magic numbers for {self.key} is: {self.value}."


def needles(count: int, draw: Random) -> list[Needle]:
    """Needles with keys of their own."""
    return [Needle(key, number(DIGITS, draw)) for key in keys(count, draw)]


def noise(size: int) -> list[str]:
    """The same five sentences again and again."""
    return [" ".join(NOISE)] * size


def hidden(haystack: Sequence[str], sentences: Sequence[str], draw: Random) -> str:
    """The haystack with these sentences at random places, in their order."""
    places = sorted(draw.choices(range(len(haystack) + 1), k=len(sentences)))
    mixed = list(haystack)
    for place, sentence in reversed(list(zip(places, sentences, strict=True))):
        mixed.insert(place, sentence)
    return " ".join(mixed)


def prompt(
    name: str, haystack: Sequence[str], found: Sequence[Needle], asked: Sequence[Question], draw: Random
) -> Prompt:
    """A haystack with needles, announced without saying which will be asked for."""
    text = hidden(haystack, [needle.sentence for needle in found], draw)
    head = "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    return Prompt(name, f"{head}I will quiz you about the numbers afterwards.\n{text}", tuple(asked))


def single(needle: Needle) -> Question:
    """Ask for the one number of a key."""
    asked = f"What is the special magic number for {needle.key} mentioned in the provided text?"
    lead = f"The special magic number for {needle.key} mentioned in the provided text is"
    return Question(f"\n{asked} {lead}", f" {needle.value}", (needle.value,), CHANCE)


def several(what: str, found: Sequence[Needle]) -> Question:
    """Ask for several numbers at once, which may come in any order."""
    asked = f"What are all the special magic numbers for {what} mentioned in the provided text?"
    lead = f"The special magic numbers for {what} mentioned in the provided text are"
    values = tuple(needle.value for needle in found)
    target = f" {', '.join(values[:-1])}, and {values[-1]}"
    return Question(f"\n{asked} {lead}", target, values, CHANCE, metric="recall", tokens=10 * len(values))


@dataclass(frozen=True)
class SingleNeedle(Task):
    """One number in prose (RULER's niah_single_2, arXiv 2404.06654)."""

    name: ClassVar[str] = "needle"

    @override
    def compose(self, prose: Prose, size: int, draw: Random) -> Prompt:
        (hidden,) = needles(1, draw)
        return prompt(self.name, prose.passage(size, draw), [hidden], [single(hidden)], draw)


@dataclass(frozen=True)
class MultiNeedle(Task):
    """Numbers of several keys in prose, each asked for in turn (RULER's niah_multikey_1, arXiv 2404.06654)."""

    name: ClassVar[str] = "multi_needle"
    keys: int = 4

    @override
    def compose(self, prose: Prose, size: int, draw: Random) -> Prompt:
        hidden = needles(self.keys, draw)
        return prompt(self.name, prose.passage(size, draw), hidden, [single(needle) for needle in hidden], draw)


@dataclass(frozen=True)
class MultiQuery(Task):
    """Numbers of several keys in prose, asked for together (RULER's niah_multiquery, arXiv 2404.06654)."""

    name: ClassVar[str] = "multi_query"
    queries: int = 4

    @override
    def compose(self, prose: Prose, size: int, draw: Random) -> Prompt:
        hidden = needles(self.queries, draw)
        asked = [needle.key for needle in draw.sample(hidden, len(hidden))]
        question = several(
            f"{', '.join(asked[:-1])}, and {asked[-1]}", sorted(hidden, key=lambda n: asked.index(n.key))
        )
        return prompt(self.name, prose.passage(size, draw), hidden, [question], draw)


@dataclass(frozen=True)
class MultiValue(Task):
    """All numbers of one key, spread over prose (RULER's niah_multivalue, arXiv 2404.06654)."""

    name: ClassVar[str] = "multi_value"
    values: int = 4

    @override
    def compose(self, prose: Prose, size: int, draw: Random) -> Prompt:
        (key,) = keys(1, draw)
        hidden = [Needle(key, number(DIGITS, draw)) for _ in range(self.values)]
        return prompt(self.name, prose.passage(size, draw), hidden, [several(key, hidden)], draw)
