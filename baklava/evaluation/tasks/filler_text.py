"""What fills contexts: sentences of real documents, and random keys, numbers and words that no text contains."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from string import ascii_lowercase

from baklava.data.documents import Document
from baklava.errors import UserError

SENTENCE_BOUNDARY = re.compile(r"(?<=[.!?。！？])\s+|\n+")
SENTENCE = re.compile(r"[\w\"'(“‘][^|{}<>#*_`]*[.!?。！？][\"')”’]*")
WORD = re.compile(r"\b[a-z]{4,10}\b")
MIN_SENTENCE_WORDS = 4


@dataclass(frozen=True)
class FillerText:
    """Sentences of documents, in their order."""

    sentences: tuple[str, ...]

    @classmethod
    def from_documents(cls, documents: Sequence[Document]) -> "FillerText":
        """Extract the sentences of documents, without headings, tables and other markup.

        Raises:
            UserError: there are none.
        """
        parts = (" ".join(part.split()) for document in documents for part in SENTENCE_BOUNDARY.split(document.text))
        sentences = tuple(
            part for part in parts if SENTENCE.fullmatch(part) and len(part.split()) >= MIN_SENTENCE_WORDS
        )
        if not sentences:
            raise UserError(
                f"the texts have no sentence of at least {MIN_SENTENCE_WORDS} words; tasks are made from prose, "
                "so name texts with prose"
            )
        return cls(sentences)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The distinct words of 4 to 10 letters, sorted."""
        return tuple(sorted({word for sentence in self.sentences for word in WORD.findall(sentence)}))

    def passage(self, count: int, rng: Random) -> list[str]:
        """Return `count` consecutive sentences from a random start; the text wraps around at its end."""
        start = rng.randrange(len(self.sentences))
        return [self.sentences[(start + step) % len(self.sentences)] for step in range(count)]


ADJECTIVES = """
amber ancient bitter blunt brave brisk bronze calm cedar clever cobalt coral crimson curious dusty eager early
electric faint fierce foggy frozen gentle gilded golden hidden hollow humble icy idle ivory jolly keen lavish lazy
linen little lively lonely loud lucky marble mellow misty modest narrow nimble noble olive pale patient placid polar
proud quiet rapid rough rusty sandy silent silver sleepy slender smooth solid stormy sturdy sudden sunny swift
tender timid velvet vivid wild windy wooden young
""".split()

NOUNS = """
acorn anchor apron arrow attic badger barrel basket beacon bishop blanket boulder bridge bucket button cabin candle
canyon carpet castle cellar chapel cherry comet copper cottage cradle crater cricket curtain dagger desert donkey
dragon engine falcon feather fiddle forest fountain garden glacier goblet hammer harbor hatchet helmet island jacket
jungle kettle kitten ladder lantern lemon lizard magnet meadow mirror monkey napkin needle orchard otter paddle
parrot pebble pepper pillow pirate pocket prairie puddle quarry rabbit raven ribbon saddle sailor scarf shadow
spider spoon statue summit teapot temple thimble ticket tiger timber tower tractor trumpet tunnel turtle valley
violin walnut whistle window winter wizard
""".split()


def random_keys(count: int, rng: Random) -> list[str]:
    """Return distinct names such as `calm-otter`, numbered if there are more than pairs of words."""
    num_pairs = len(ADJECTIVES) * len(NOUNS)
    names = []
    for index in rng.sample(range(max(num_pairs, count)), count):
        number, pair = divmod(index, num_pairs)
        name = f"{ADJECTIVES[pair % len(ADJECTIVES)]}-{NOUNS[pair // len(ADJECTIVES)]}"
        names.append(f"{name}-{number}" if number else name)
    return names


def random_number(digits: int, rng: Random) -> str:
    """Return a number with exactly this many digits."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def random_words(count: int, letters: int, rng: Random) -> list[str]:
    """Return distinct words of random letters."""
    words: set[str] = set()
    while len(words) < count:
        words.add("".join(rng.choices(ascii_lowercase, k=letters)))
    return rng.sample(sorted(words), count)
