"""From tokens to the text that may be sent already: no half characters, nothing that may become a stop string."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from serve_app.work import Finish
from serve_app.sampling import Sampling

_LONGEST_CHARACTER = 8  # tokens; UTF-8 needs up to 4 bytes, and what is still no text after twice that never will be


@dataclass(frozen=True)
class Piece:
    """What one token adds to the answer: its text, which may be empty, and why the answer ends with it, if it does."""

    text: str
    finish: Finish | None = None


class Detokenizer:
    """Decodes token by token, holding back characters whose bytes are incomplete."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Text is decoded from `_start` because a tokenizer may drop a leading space; it is known up to `_read`.
        self._start = self._read = 0

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        self._ids.append(token)
        text = self._decode(self._start, len(self._ids))
        pending = len(self._ids) - self._read
        return "" if text.endswith("\ufffd") and pending < _LONGEST_CHARACTER else self._advance(text)

    def flush(self) -> str:
        """What is held back, with replacement characters for what stayed incomplete."""
        return self._advance(self._decode(self._start, len(self._ids)))

    def _advance(self, text: str) -> str:
        known = len(self._decode(self._start, self._read))
        self._start, self._read = self._read, len(self._ids)
        return text[known:]

    def _decode(self, start: int, end: int) -> str:
        ids = self._ids[start:end]
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopStrings:
    """Cuts text before the first stop string, holding back every end that may begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """The text that is safe to send; `hit` is set when a stop string ended it."""
        text = self._held + text
        found = [index for index in map(text.find, self._stops) if index >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper start of `stop` that ends `text`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def pieces(
    engine: Engine, tokenizer: Any, prompt: Sequence[int], sampling: Sampling, stops: Sequence[str]
) -> Generator[Piece]:
    """Generate, one piece per token; the last has a `finish`. A token or string that stops is not part of the text."""
    detokenizer, stop_strings = Detokenizer(tokenizer), StopStrings(stops)
    with closing(engine.generate(prompt, sampling)) as tokens:
        for token in tokens:
            text = "" if token.finish == "stop" else stop_strings.push(detokenizer.push(token.id))
            if token.finish and not stop_strings.hit:
                text += stop_strings.push(detokenizer.flush())
            if stop_strings.hit:
                yield Piece(text, "stop")
                return
            yield Piece(text + stop_strings.flush() if token.finish else text, token.finish)
