"""Frequent words: the three most frequent of a coded text."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from typing_extensions import override

from baklava.tasks.base import Prompt, Question, Task
from baklava.tasks.prose import Prose
from baklava.tasks.words import coded

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
