"""Several keys, all asked for in one question."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from typing_extensions import override

from baklava.tasks.base import Prompt, Task
from baklava.tasks.needles import needles, prompt, several
from baklava.tasks.prose import Prose


@dataclass(frozen=True)
class MultiQuery(Task):
    """Numbers of several keys in prose, asked for together (RULER's niah_multiquery, arXiv 2404.06654)."""

    name: ClassVar[str] = "multi_query"
    queries: int = 4

    @override
    def compose(self, prose: Prose, size: int, draw: Random) -> Prompt:
        hidden = needles(self.queries, draw)
        asked = [needle.key for needle in draw.sample(hidden, len(hidden))]
        question = several(
            f"{', '.join(asked[:-1])}, and {asked[-1]}", sorted(hidden, key=lambda n: asked.index(n.key))
        )
        return prompt(self.name, prose.passage(size, draw), hidden, [question], draw)
