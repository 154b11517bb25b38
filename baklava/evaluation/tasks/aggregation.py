"""Common words: which words of a long list come again and again."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from typing_extensions import override

from baklava.errors import UserError
from baklava.evaluation.tasks.base import Prompt, Question, Task
from baklava.evaluation.tasks.filler_text import Prose
from baklava.evaluation.tasks.word_lists import coded


@dataclass(frozen=True)
class CommonWords(Task):
    """The words that a numbered list repeats (RULER's common_words_extraction, arXiv 2404.06654).

    Ten times as often as all others, as there, but ten times against once where RULER has thirty against three, so that
    the list also fits into 1,000 tokens.
    """

    name: ClassVar[str] = "common_words"
    common: int = 10
    repeats: int = 10

    @override
    def compose(self, prose: Prose, size: int, draw: Random) -> Prompt:
        known = prose.words
        if len(known) < 2 * self.common:
            raise UserError(
                f"{self.name} needs {2 * self.common} different words, the texts have {len(known)}; add text"
            )
        order = draw.sample(known, len(known))
        common, other = order[: self.common], order[self.common :]
        # A list longer than the vocabulary repeats it, and its common words with it.
        rounds, rest = divmod(size, len(other))
        words = common * self.repeats * (rounds + 1) + other * rounds + other[:rest]
        listed = " ".join(f"{number}. {word}" for number, word in enumerate(draw.sample(words, len(words)), start=1))
        head = "Below is a numbered list of words. In these words, some appear more often than others."
        context = f"{head} Memorize the ones that appear most often.\n{listed}"
        return Prompt(self.name, context, (self._question(common),))

    def _question(self, common: list[str]) -> Question:
        asked = f"Question: What are the {self.common} most common words in the above list?"
        lead = f"Answer: The top {self.common} words that appear most often in the list are:"
        listed = " ".join(f"{number}. {word}" for number, word in enumerate(common, start=1))
        return Question(f"\n{asked} {lead}", f" {listed}", tuple(common), metric="recall", tokens=5 * self.common)


VOCABULARY = 200
DOTS = "..."


@dataclass(frozen=True)
class FrequentWords(Task):
    """The leaders of coded words that follow Zipf's law (RULER's frequent_words_extraction, arXiv 2404.06654).

    The most frequent of all are dots, which do not count.
    """

    name: ClassVar[str] = "frequent_words"
    alpha: float = 2.0

    @override
    def compose(self, prose: Prose, size: int, draw: Random) -> Prompt:
        words = [DOTS, *coded(VOCABULARY, 6, draw)]
        frequency = [(rank + 1) ** -self.alpha for rank in range(len(words))]
        counts = [round(share / sum(frequency) * size) + max(0, 4 - rank) for rank, share in enumerate(frequency)]
        text = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        head = "Read the following coded text and track the frequency of each coded word."
        context = (
            f"{head} Find the three most frequently appeared coded words.\n{' '.join(draw.sample(text, len(text)))}"
        )
        return Prompt(self.name, context, (self._question(words[1:4]),))

    def _question(self, words: list[str]) -> Question:
        asked = f"Question: Do not provide any explanation. Please ignore the dots '{DOTS}'."
        asked += " What are the three most frequently appeared words in the above coded text?"
        lead = "Answer: According to the coded text above, the three most frequently appeared words are:"
        return Question(f"\n{asked} {lead}", f" {', '.join(words)}", tuple(words), metric="recall", tokens=24)
