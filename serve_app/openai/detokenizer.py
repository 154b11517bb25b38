"""Turn generated tokens into text that may be sent: whole characters, and nothing that may become a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

from baklava.runtime.continuation_text import (
    added_text,
    decode_tokens,
    has_text,
    special_token_text,
    text_context,
)
from serve_app.engine.types import FinishReason, Logprob, TokenOutput

# UTF-8 needs up to 4 bytes for a character. Twice as many tokens that are still no text never will be.
_MAX_TOKENS_PER_CHARACTER = 8


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer with its log-probability in nats, the most likely tokens, and its place in the text.

    `text_offset` counts the characters before the token. `starts_text` is set if no token before it has a text, not
    even one of the prompt: many tokenizers then drop the token's first space.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    text_offset: int
    starts_text: bool = False


@dataclass(frozen=True)
class TextDelta:
    """Text to append to choice `index` of an answer, which may be empty, and why the choice ends with it, if it does.

    `logprobs` is empty unless log-probabilities were requested.
    """

    text: str
    index: int = 0
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


class DecodeStream:
    """Decode token by token after the tokens `before`, and wait for the rest of incomplete characters."""

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = text_context(tokenizer, before)
        # Text is decoded from `_start`, because a tokenizer may drop a leading space. Up to `_read` it was returned.
        # `_start` is never inside a character: many tokenizers decode no byte after one that is no text.
        self._start, self._read = 0, len(self._ids)

    @property
    def is_empty(self) -> bool:
        """Whether no token had a text so far."""
        return not self._ids

    def push(self, token_id: int) -> str:
        """Return the text that a token completes."""
        if not has_text(self._tokenizer, token_id):
            return ""  # nor is it a context for the next one
        self._ids.append(token_id)
        text = self._decode(self._start, len(self._ids))
        pending_tokens = len(self._ids) - self._read
        return "" if text.endswith("\ufffd") and pending_tokens < _MAX_TOKENS_PER_CHARACTER else self._advance(text)

    def flush(self) -> str:
        """Return the rest of the text, with replacement characters for incomplete ones."""
        return self._advance(self._decode(self._start, len(self._ids)))

    def _advance(self, text: str) -> str:
        added, complete = added_text(self._tokenizer, self._ids[self._start : self._read], text)
        self._start, self._read = self._start + complete, len(self._ids)
        return added

    def _decode(self, start: int, end: int) -> str:
        return decode_tokens(self._tokenizer, self._ids[start:end])


class StopStringFilter:
    """Truncate text before the first stop string, and buffer each end that may be the start of one."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = tuple(stop_strings)
        self._buffer = ""
        self._is_visible: list[bool] = []  # per character of the buffer
        self.matched = False

    def push(self, text: str, *, below_min_tokens: bool = False, visible: bool = True) -> str:
        """Return the text that is safe to send, and set `matched` if a stop string ends it.

        `below_min_tokens` disables matching, for an answer that must not end yet. Text that is not `visible` may be
        part of a stop string and is never returned.
        """
        already_seen = len(self._buffer)
        self._buffer += text
        self._is_visible += [visible] * len(text)
        if not below_min_tokens:
            # Search for new matches only: a stop string that was complete in the buffer came below min_tokens.
            matches = [self._buffer.find(stop, max(0, already_seen - len(stop) + 1)) for stop in self._stop_strings]
            if matches := [position for position in matches if position >= 0]:
                self.matched = True
                sent = self._take(min(matches))
                self._take(len(self._buffer))
                return sent
        overlap = max((_overlap_length(self._buffer, stop) for stop in self._stop_strings), default=0)
        return self._take(len(self._buffer) - overlap)

    def is_in_stop_string(self, text: str) -> bool:
        """Return whether a stop string contains this text; the empty one does not count."""
        return bool(text) and any(text in stop for stop in self._stop_strings)

    def flush(self) -> str:
        """Return the buffered text, which did not become a stop string."""
        return self._take(len(self._buffer))

    def _take(self, characters: int) -> str:
        taken = "".join(compress(self._buffer[:characters], self._is_visible))
        self._buffer, self._is_visible = self._buffer[characters:], self._is_visible[characters:]
        return taken


def _overlap_length(text: str, stop: str) -> int:
    """Return the length of the longest proper prefix of `stop` with which `text` ends."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class IncrementalDetokenizer:
    """Turn the tokens of one sequence into text deltas until it finishes, because of a token or of a stop string.

    Args:
        tokenizer: Of the model.
        prompt: Token ids before the sequence.
        stop_strings: Strings that end the text. They are not part of it.
        text_offset: Characters of the answer before this text, such as an echoed prompt.
        min_tokens: Tokens before which no stop string ends the text.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        stop_strings: Sequence[str],
        text_offset: int = 0,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(tokenizer, prompt)
        self._filter = StopStringFilter(stop_strings)
        self._text_offset = text_offset
        self._missing_tokens = min_tokens
        self.finish_reason: FinishReason | None = None

    def add_token(self, token: TokenOutput) -> TextDelta:
        """Return what a token adds. A token or string that stops is not part of the text."""
        offset, starts_text = self._text_offset, self._decoder.is_empty
        self._missing_tokens -= 1
        text = "" if token.finish_reason == "stop" else self._push_token(token.token_id)
        if token.finish_reason and not self._filter.matched:
            text += self._push(self._decoder.flush())
        if token.finish_reason and not self._filter.matched:
            text += self._filter.flush()
        self.finish_reason = "stop" if self._filter.matched else token.finish_reason
        logprobs = (_placed(token.logprob, offset, starts_text),) if token.logprob else ()
        return TextDelta(text, token.index, self.finish_reason, logprobs)

    def _push_token(self, token_id: int) -> str:
        if text := self._decoder.push(token_id):
            return self._push(text)
        # A stop string may contain special tokens, which are not part of the text.
        special = special_token_text(self._tokenizer, token_id)
        return self._push(special, visible=False) if self._filter.is_in_stop_string(special) else ""

    def _push(self, text: str, visible: bool = True) -> str:
        self._text_offset += len(text) if visible else 0
        return self._filter.push(text, below_min_tokens=self._missing_tokens > 0, visible=visible)


def prompt_token_logprobs(
    tokenizer: Any, ids: Sequence[int], logprobs: Sequence[Logprob | None]
) -> tuple[TokenLogprob, ...]:
    """Return the tokens of a prompt with their log-probabilities and their places in the text."""
    decoder, offset, tokens = DecodeStream(tokenizer), 0, []
    for token_id, logprob in zip(ids, logprobs, strict=True):
        if logprob is None:
            tokens.append(TokenLogprob(token_id, None, (), offset, decoder.is_empty))
        else:
            tokens.append(_placed(logprob, offset, decoder.is_empty))
        offset += len(decoder.push(token_id))
    return tuple(tokens)


def _placed(logprob: Logprob, text_offset: int, starts_text: bool) -> TokenLogprob:
    return TokenLogprob(logprob.token_id, logprob.logprob, logprob.top, text_offset, starts_text)
