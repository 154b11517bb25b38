"""Passkey retrieval: one number in noise."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from typing_extensions import override

from baklava.tasks.base import Prompt, Task
from baklava.tasks.needles import needles, noise, prompt, single
from baklava.tasks.prose import Prose


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
