"""What all tasks share: a context of filler text, questions about it, and a builder that fits a prompt to a length."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from string import ascii_lowercase
from typing import ClassVar

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


TokenCounter = Callable[[str], int]


@dataclass(frozen=True)
class Question:
    """A question that is asked after the context has been compressed to its plan.

    Attributes:
        text: the question; it ends where the answer begins.
        target: the answer whose NLL is measured.
        answers: what the metric looks for in a generated answer.
        chance: the score of a guess by somebody who knows the form of the answers but not the context.
        metric: a name in `baklava.evaluation.tasks.metrics`, or "exact": greedy decoding yields `target`.
        max_new_tokens: tokens to generate at most; "exact" generates none.
        choices: all possible answers, if the task has such a list.
    """

    text: str
    target: str
    answers: tuple[str, ...] = ()
    chance: float = 0.0
    metric: str = "exact"
    max_new_tokens: int = 0
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A context that is prefilled once, and the questions about it.

    Raises:
        ValueError: a question's text is empty or part of the context, so eviction would know it.
    """

    name: str
    context: str
    questions: tuple[Question, ...]

    def __post_init__(self) -> None:
        for question in self.questions:
            if not question.text:
                raise ValueError(f"a question of {self.name} has no text; ask in at least one word")
            if (text := question.text.strip()) and text in self.context:
                raise ValueError(f"{self.name} already asks {text!r} in its context; ask after the context")

    def num_tokens(self, count_tokens: TokenCounter) -> int:
        """Return the tokens of the context with its longest question and answer."""
        questions = (
            count_tokens(question.text) + max(count_tokens(question.target), question.max_new_tokens)
            for question in self.questions
        )
        return count_tokens(self.context) + max(questions, default=0)


@dataclass(frozen=True)
class Task(ABC):
    """A kind of prompt. The fields of the dataclass are its parameters; its one verb builds a prompt of any size."""

    name: ClassVar[str]

    @abstractmethod
    def build(self, filler: FillerText, size: int, rng: Random) -> Prompt:
        """Build a prompt whose context has `size` units (at least 1), such as sentences, pairs or words.

        The same state of `rng` and the same size give the same prompt; a larger size gives a longer one.
        """


def build_prompts(
    task: Task, filler: FillerText, count: int, *, tokens: int, seed: int, count_tokens: TokenCounter
) -> list[Prompt]:
    """Build `count` prompts, each the longest that fits into `tokens` with its longest question and answer.

    Raises:
        UserError: the smallest prompt does not fit, or the longest has nothing to ask about.
    """
    return [_build_longest(task, filler, f"{task.name}:{n}", tokens, seed, count_tokens) for n in range(count)]


def _build_longest(
    task: Task, filler: FillerText, name: str, tokens: int, seed: int, count_tokens: TokenCounter
) -> Prompt:
    def build(size: int) -> Prompt:
        return replace(task.build(filler, size, Random(f"{seed}:{name}")), name=name)

    def fits(size: int) -> bool:
        return build(size).num_tokens(count_tokens) <= tokens

    if not fits(1):
        smallest = build(1).num_tokens(count_tokens)
        raise UserError(f"the smallest {task.name} prompt has {smallest} tokens, more than {tokens}; allow longer ones")
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    longest = build(low)
    if not longest.questions:
        raise UserError(f"a {task.name} prompt of {tokens} tokens of these texts has nothing to ask; give longer texts")
    return longest
