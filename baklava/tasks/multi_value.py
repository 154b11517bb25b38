"""One key with several numbers, all asked for at once."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from typing_extensions import override

from baklava.tasks.base import Prompt, Task
from baklava.tasks.needles import DIGITS, Needle, prompt, several
from baklava.tasks.prose import Prose
from baklava.tasks.words import keys, number


@dataclass(frozen=True)
class MultiValue(Task):
    """All numbers of one key, spread over prose (RULER's niah_multivalue, arXiv 2404.06654)."""

    name: ClassVar[str] = "multi_value"
    values: int = 4

    @override
    def compose(self, prose: Prose, size: int, draw: Random) -> Prompt:
        (key,) = keys(1, draw)
        hidden = [Needle(key, number(DIGITS, draw)) for _ in range(self.values)]
        return prompt(self.name, prose.passage(size, draw), hidden, [several(key, hidden)], draw)
