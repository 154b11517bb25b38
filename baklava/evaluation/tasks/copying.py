"""Verbatim copy: a sentence from somewhere in the context, to the letter."""

from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from typing_extensions import override

from baklava.evaluation.tasks.base import Prompt, Question, Task
from baklava.evaluation.tasks.filler_text import Prose

LEAD = 5  # words of the sentence that the question gives
COPIED = 8  # words that are to follow


@dataclass(frozen=True)
class Copy(Task):
    """The next words of sentences of the context, given their first ones."""

    name: ClassVar[str] = "copy"
    queries: int = 4

    @override
    def compose(self, prose: Prose, size: int, draw: Random) -> Prompt:
        sentences = prose.passage(size, draw)
        text = " ".join(sentences)
        starts = Counter(" ".join(sentence.split()[:LEAD]) for sentence in sentences)
        fit = [s for s in sentences if len(s.split()) >= LEAD + COPIED and starts[" ".join(s.split()[:LEAD])] == 1]
        asked = draw.sample(fit, min(self.queries, len(fit)))
        return Prompt(self.name, text, tuple(_question(sentence) for sentence in asked))


def _question(sentence: str) -> Question:
    words = sentence.split()
    lead, rest = " ".join(words[:LEAD]), " ".join(words[LEAD : LEAD + COPIED])
    # Once only: after a lead that is quoted first, the model would copy what follows the quotation.
    return Question(f"\n\nOnce more, word for word:\n{lead}", f" {rest}", (rest,))
