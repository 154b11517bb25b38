"""Prompts out of the demo texts, cut to so many tokens."""

import random
from dataclasses import dataclass

from baklava.errors import UserError
from baklava.model import LoadedModel
from baklava.texts import documents


@dataclass(frozen=True)
class Prompt:
    """A text, and how many tokens it has."""

    text: str
    tokens: int


class Prompts:
    """Draws prompts; no two begin alike, so that no server can take one's cache for another."""

    def __init__(self, loaded: LoadedModel, texts: str, seed: int) -> None:
        self._tokenizer, self._draws = loaded.tokenizer, random.Random(seed)
        joined = "\n\n".join(document.text for document in documents([texts]))
        self._ids: list[int] = self._tokenizer.encode(joined, add_special_tokens=False, verbose=False)

    def of(self, tokens: int) -> Prompt:
        """A prompt of about so many tokens."""
        if tokens > len(self._ids) // 2:
            raise UserError(f"prompts of {tokens} tokens out of texts of {len(self._ids)}; name longer texts")
        start = self._draws.randrange(len(self._ids) - tokens)
        text = self._tokenizer.decode(self._ids[start : start + tokens])
        return Prompt(text, len(self._tokenizer.encode(text, verbose=False)))

    def between(self, fewest: int, most: int) -> Prompt:
        """A prompt of any length between these, all as likely."""
        return self.of(self._draws.randint(fewest, most))
