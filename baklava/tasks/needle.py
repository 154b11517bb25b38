"""A needle in a haystack: one number in prose."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from typing_extensions import override

from baklava.tasks.base import Prompt, Task
from baklava.tasks.needles import needles, prompt, single
from baklava.tasks.prose import Prose


@dataclass(frozen=True)
class SingleNeedle(Task):
    """One number in prose (RULER's niah_single_2, arXiv 2404.06654)."""

    name: ClassVar[str] = "needle"

    @override
    def compose(self, prose: Prose, size: int, draw: Random) -> Prompt:
        (hidden,) = needles(1, draw)
        return prompt(self.name, prose.passage(size, draw), [hidden], [single(hidden)], draw)
