"""From tokens to the text that may be sent already: no half characters, nothing that may become a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.engine.types import FinishReason, Logprob, TokenOutput

_LONGEST_CHARACTER = 8  # tokens; UTF-8 needs up to 4 bytes, and what is still no text after twice that never will be


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer, where its text begins, in characters, and how likely it and others were, in nats."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    text_offset: int

    @classmethod
    def of(cls, logprob: Logprob, offset: int) -> "TokenLogprob":
        """A token at its place."""
        return cls(logprob.token_id, logprob.logprob, logprob.top, offset)


@dataclass(frozen=True)
class TextDelta:
    """What is added to an answer: text, which may be empty, and why the answer ends with it, if it does.

    `words` are there if log-probabilities were asked for.
    """

    text: str
    index: int = 0
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


class DecodeStream:
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


class StopStringFilter:
    """Cuts text before the first stop string, holding back every end that may begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def push(self, text: str, early: bool = False) -> str:
        """The text that is safe to send; `hit` is set when a stop string ended it, which none does that is `early`."""
        known, text = len(self._held), self._held + text
        # Only a stop string whose end is new counts: one that is whole in what was known came too early.
        places = [text.find(stop, max(0, known - len(stop) + 1)) for stop in self._stops]
        found = [] if early else [place for place in places if place >= 0]
        if found:
            self.matched, self._held = True, ""
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


class IncrementalDetokenizer:
    """Writes one continuation: tokens go in, text that may be sent comes out, until a finish.

    `offset` counts the characters of an answer before this text, such as an echoed prompt. Before there are
    `min_tokens` tokens no stop string ends it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], offset: int = 0, min_tokens: int = 0) -> None:
        self._detokenizer, self._stops, self._offset = DecodeStream(tokenizer), StopStringFilter(stops), offset
        self._early = min_tokens  # tokens that are still missing
        self.finish_reason: FinishReason | None = None

    def add_token(self, token: TokenOutput) -> TextDelta:
        """What a token adds; a token or string that stops is not part of the text."""
        place, self._early = self._offset, self._early - 1
        decoded = "" if token.finish_reason == "stop" else self._detokenizer.push(token.token_id)
        text = self._push(decoded)
        if token.finish_reason and not self._stops.matched:
            text += self._push(self._detokenizer.flush())
        if token.finish_reason and not self._stops.matched:
            text += self._stops.flush()
        self.finish_reason = "stop" if self._stops.matched else token.finish_reason
        word = TokenLogprob.of(token.logprob, place) if token.logprob else None
        return TextDelta(text, token.index, self.finish_reason, (word,) if word else ())

    def _push(self, decoded: str) -> str:
        self._offset += len(decoded)
        return self._stops.push(decoded, early=self._early > 0)


def prompt_token_logprobs(tokenizer: Any, ids: Sequence[int], logprobs: Sequence[Logprob | None]) -> tuple[TokenLogprob, ...]:
    """The tokens of a prompt with their log-probabilities, each where it is in the text."""
    detokenizer, offset, words = DecodeStream(tokenizer), 0, []
    for id, logprob in zip(ids, logprobs, strict=True):
        words.append(TokenLogprob.of(logprob, offset) if logprob else TokenLogprob(id, None, (), offset))
        offset += len(detokenizer.push(id))
    return tuple(words)
