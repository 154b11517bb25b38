"""Passkey retrieval: one number in noise."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from typing_extensions import override

from baklava.evaluation.tasks.base import Prompt, Question, Task
from baklava.evaluation.tasks.filler_text import Prose
from baklava.evaluation.tasks.needle import needles, noise, prompt, single
from baklava.evaluation.tasks.word_lists import keys, number


@dataclass(frozen=True)
class Passkey(Task):
    """One number in the same five sentences again and again (RULER's niah_single_1, arXiv 2404.06654).

    Easy for eviction by attention, since only the number is unlike the rest: read it next to `needle`.
    """

    name: ClassVar[str] = "passkey"

    @override
    def compose(self, prose: Prose, size: int, draw: Random) -> Prompt:
        (hidden,) = needles(1, draw)
        return prompt(self.name, noise(size), [hidden], [single(hidden)], draw)


DIGITS = 5


@dataclass(frozen=True)
class KeyValueRetrieval(Task):
    """Values of some keys out of a list of pairs (as in "Lost in the middle", arXiv 2307.03172, with words as keys).

    Hardest for eviction: the list has no filler, and nothing says which pairs will be asked for.
    """

    name: ClassVar[str] = "kv_retrieval"
    queries: int = 10

    @override
    def compose(self, prose: Prose, size: int, draw: Random) -> Prompt:
        count = max(size, self.queries)
        names = draw.sample(prose.words, count) if count <= len(prose.words) else keys(count, draw)
        pairs = [(name, number(DIGITS, draw)) for name in names]
        listed = "\n".join(f"{key}: {value}" for key, value in pairs)
        asked = [self._question(*pair) for pair in draw.sample(pairs, self.queries)]
        return Prompt(self.name, f"Memorize this list of keys and their values.\n{listed}", tuple(asked))

    def _question(self, key: str, value: str) -> Question:
        text = f"\n\nRepeat from the list above:\n{key}:"
        return Question(text, f" {value}", (value,), chance=1 / (9 * 10 ** (DIGITS - 1)))
