"""Common words: which words of a long list come again and again."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from typing_extensions import override

from baklava.errors import UserError
from baklava.tasks.base import Prompt, Question, Task
from baklava.tasks.prose import Prose


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
