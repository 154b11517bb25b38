"""Prose that fills contexts: the sentences of real documents, in their order."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

from baklava.data.documents import Document
from baklava.errors import UserError

END = re.compile(r"(?<=[.!?。！？])\s+|\n+")
SENTENCE = re.compile(r"[\w\"'(“‘][^|{}<>#*_`]*[.!?。！？][\"')”’]*")
WORD = re.compile(r"\b[a-z]{4,10}\b")
SHORTEST = 4  # words


@dataclass(frozen=True)
class Prose:
    """Sentences in the order in which documents have them."""

    sentences: tuple[str, ...]

    @classmethod
    def of(cls, documents: Sequence[Document]) -> "Prose":
        """The sentences of these documents; headings, tables and other markup are left out.

        Raises:
            UserError: they hold none.
        """
        parts = (" ".join(part.split()) for document in documents for part in END.split(document.text))
        sentences = tuple(part for part in parts if SENTENCE.fullmatch(part) and len(part.split()) >= SHORTEST)
        if not sentences:
            raise UserError(f"no sentence of {SHORTEST} words is in the texts; tasks are made from prose, so name some")
        return cls(sentences)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The different words of middling length, sorted."""
        return tuple(sorted({word for sentence in self.sentences for word in WORD.findall(sentence)}))

    def passage(self, count: int, draw: Random) -> list[str]:
        """`count` sentences in a row from a random place; a text that ends goes on from its beginning."""
        start = draw.randrange(len(self.sentences))
        return [self.sentences[(start + step) % len(self.sentences)] for step in range(count)]
