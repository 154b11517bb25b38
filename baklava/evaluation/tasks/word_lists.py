"""Tasks over lists of words: find the most frequent ones, or name the kind of a word."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from typing_extensions import override

from baklava.errors import UserError
from baklava.evaluation.tasks.base import FillerText, Prompt, Question, Task, random_words


@dataclass(frozen=True)
class CommonWords(Task):
    """The words that a numbered list repeats (RULER's common_words_extraction, arXiv 2404.06654).

    They are ten times as frequent as all others, as in RULER, but with counts of 10 and 1 instead of 30 and 3, so that
    the list also fits into 1,000 tokens.
    """

    name: ClassVar[str] = "common_words"
    common: int = 10
    repeats: int = 10

    @override
    def build(self, filler: FillerText, size: int, rng: Random) -> Prompt:
        vocabulary = filler.words
        if len(vocabulary) < 2 * self.common:
            raise UserError(
                f"{self.name} needs {2 * self.common} different words, but the texts have {len(vocabulary)}; add text"
            )
        shuffled = rng.sample(vocabulary, len(vocabulary))
        common, other = shuffled[: self.common], shuffled[self.common :]
        # A list longer than the vocabulary repeats it, and its common words with it.
        rounds, rest = divmod(size, len(other))
        words = common * self.repeats * (rounds + 1) + other * rounds + other[:rest]
        head = "Below is a numbered list of words. In these words, some appear more often than others."
        context = f"{head} Memorize the ones that appear most often.\n{_numbered(rng.sample(words, len(words)))}"
        question = f"Question: What are the {self.common} most common words in the above list?"
        lead = f"Answer: The top {self.common} words that appear most often in the list are:"
        return Prompt(
            self.name,
            context,
            (
                Question(
                    f"\n{question} {lead}",
                    f" {_numbered(common)}",
                    tuple(common),
                    metric="recall",
                    max_new_tokens=5 * self.common,
                ),
            ),
        )


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


VOCABULARY_WORDS = 200
DOTS = "..."


@dataclass(frozen=True)
class FrequentWords(Task):
    """The most frequent of coded words that follow Zipf's law (RULER's frequent_words_extraction, arXiv 2404.06654).

    Dots are the most frequent of all and do not count.
    """

    name: ClassVar[str] = "frequent_words"
    alpha: float = 2.0

    @override
    def build(self, filler: FillerText, size: int, rng: Random) -> Prompt:
        words = [DOTS, *random_words(VOCABULARY_WORDS, 6, rng)]
        frequency = [(rank + 1) ** -self.alpha for rank in range(len(words))]
        counts = [round(share / sum(frequency) * size) + max(0, 4 - rank) for rank, share in enumerate(frequency)]
        text = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        head = "Read the following coded text and track the frequency of each coded word."
        shuffled = " ".join(rng.sample(text, len(text)))
        context = f"{head} Find the three most frequently appeared coded words.\n{shuffled}"
        top = tuple(words[1:4])
        question = f"Question: Do not provide any explanation. Please ignore the dots '{DOTS}'."
        question += " What are the three most frequently appeared words in the above coded text?"
        lead = "Answer: According to the coded text above, the three most frequently appeared words are:"
        return Prompt(
            self.name,
            context,
            (Question(f"\n{question} {lead}", f" {', '.join(top)}", top, metric="recall", max_new_tokens=24),),
        )


KINDS = {
    "animal": "dog cat horse cow sheep goat lion wolf fox bear rabbit mouse elephant monkey camel deer pig zebra whale "
    "eagle parrot frog snake tiger",
    "food": "bread rice cheese apple banana soup pasta butter honey cake potato tomato carrot onion grape lemon sugar "
    "pizza salad peach sausage pancake cookie pear",
    "tool": "hammer saw drill wrench axe shovel rake chisel screwdriver pliers ladder scissors knife needle broom "
    "bucket rope nail spade sickle crowbar mallet trowel lever",
    "country": "France Japan Brazil Canada Egypt India Kenya Mexico Norway Peru Spain Sweden Turkey Italy Germany "
    "China Greece Chile Cuba Ireland Poland Portugal Vietnam Nepal",
}


@dataclass(frozen=True)
class FewShot(Task):
    """The kind of a word, after a list of words with their kinds; a plan that fails here has broken the model.

    No word that is asked for is in the list. Chance is one in four.
    """

    name: ClassVar[str] = "few_shot"
    queries: int = 8

    @override
    def build(self, filler: FillerText, size: int, rng: Random) -> Prompt:
        pairs = [(word, kind) for kind, words in KINDS.items() for word in words.split()]
        shuffled = rng.sample(pairs, len(pairs))
        queries, shots = shuffled[: self.queries], shuffled[self.queries :]
        repeated_shots = [shots[number % len(shots)] for number in range(size)]
        text = "\n\n".join(f"Word: {word}\nKind: {kind}" for word, kind in repeated_shots)
        chance, choices = 1 / len(KINDS), tuple(KINDS)
        questions = [
            Question(f"\n\nWord: {word}\nKind:", f" {kind}", (kind,), chance=chance, choices=choices)
            for word, kind in queries
        ]
        return Prompt(self.name, text, tuple(questions))
