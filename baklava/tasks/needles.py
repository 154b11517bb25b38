"""Needles in a haystack, as RULER (arXiv 2404.06654) words them: sentences that give a key its number."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from baklava.tasks.base import Prompt, Question
from baklava.tasks.words import keys, number

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
