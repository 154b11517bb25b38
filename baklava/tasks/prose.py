"""Prose that fills contexts: the sentences of real documents, in their order."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from baklava.errors import UserError
from baklava.texts import Document

END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])|\n+")
SHORTEST = 3  # words; headings and list marks are no sentences


@dataclass(frozen=True)
class Prose:
    """Sentences in the order in which documents have them."""

    sentences: tuple[str, ...]

    @classmethod
    def of(cls, documents: Sequence[Document]) -> "Prose":
        """The sentences of these documents.

        Raises:
            UserError: they hold none.
        """
        parts = (part.strip() for document in documents for part in END.split(document.text))
        sentences = tuple(" ".join(part.split()) for part in parts if len(part.split()) >= SHORTEST)
        if not sentences:
            raise UserError(f"no sentence of {SHORTEST} words is in the texts; tasks are made from prose, so name some")
        return cls(sentences)

    def passage(self, count: int, draw: Random) -> list[str]:
        """`count` sentences in a row from a random place; a text that ends goes on from its beginning."""
        start = draw.randrange(len(self.sentences))
        return [self.sentences[(start + step) % len(self.sentences)] for step in range(count)]
