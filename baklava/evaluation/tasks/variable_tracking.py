"""Variable tracking: which variables got a value, directly or by way of others."""

from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import ClassVar

from typing_extensions import override

from baklava.evaluation.tasks.base import Prompt, Question, Task
from baklava.evaluation.tasks.filler_text import Prose
from baklava.evaluation.tasks.needle import hidden, noise
from baklava.evaluation.tasks.word_lists import coded, number

DIGITS = 5


@dataclass(frozen=True)
class VariableTracking(Task):
    """A chain of assignments in noise, all its variables asked for (RULER's variable_tracking, arXiv 2404.06654)."""

    name: ClassVar[str] = "variable_tracking"
    hops: int = 4

    @override
    def compose(self, prose: Prose, size: int, draw: Random) -> Prompt:
        names = [word.upper() for word in coded(self.hops + 1, 5, draw)]
        value = number(DIGITS, draw)
        chain = [f"VAR {names[0]} = {value}."]
        chain += [f"VAR {later} = VAR {earlier}." for earlier, later in pairwise(names)]
        head = "Memorize and track the chain(s) of variable assignment hidden in the following text."
        return Prompt(self.name, f"{head}\n\n{hidden(noise(size), chain, draw)}", (self._question(names, value),))

    def _question(self, names: list[str], value: str) -> Question:
        asked = f"Question: Find all variables that are assigned the value {value} in the text above."
        lead = f"Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are"
        text = f"\n{asked} {lead} assigned the value {value}, they are:"
        return Question(text, f" {', '.join(names)}", tuple(names), metric="recall", tokens=6 * len(names))
