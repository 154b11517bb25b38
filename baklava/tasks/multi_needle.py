"""Several needles of which one is asked for: the others distract."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from typing_extensions import override

from baklava.tasks.base import Prompt, Task
from baklava.tasks.needles import needles, prompt, single
from baklava.tasks.prose import Prose


@dataclass(frozen=True)
class MultiNeedle(Task):
    """Numbers of several keys in prose, each asked for in turn (RULER's niah_multikey_1, arXiv 2404.06654)."""

    name: ClassVar[str] = "multi_needle"
    keys: int = 4

    @override
    def compose(self, prose: Prose, size: int, draw: Random) -> Prompt:
        hidden = needles(self.keys, draw)
        return prompt(self.name, prose.passage(size, draw), hidden, [single(needle) for needle in hidden], draw)
