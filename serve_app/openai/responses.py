"""Log-probabilities as OpenAI's two kinds of answer write them."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from serve_app.openai.detokenizer import TextDelta, TokenLogprob
from serve_app.openai.errors import as_api_error
from serve_app.openai.output_processor import Usage
from serve_app.openai.protocol import StreamOptions

Json = dict[str, Any]

LEAST = -9999.0
"""Stands for a log-probability of minus infinity, which JSON has no number for."""


@dataclass(frozen=True)
class Names:
    """Writes tokens as text, or, with `as_ids`, as `token_id:7`."""

    tokenizer: Any
    as_ids: bool = False

    def text(self, id: int) -> str:
        """A token by itself; half a character is U+FFFD."""
        if self.as_ids:
            return f"token_id:{id}"
        return self.tokenizer.decode([id], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def apart(self, ids: Sequence[int]) -> dict[int, str]:
        """A name for each of these tokens and no name twice: of those that look the same, only the first has its text.

        Clients tell tokens apart by these names, and look for the likeliest one among them.
        """
        named: dict[int, str] = {}
        for id in ids:
            text = self.text(id)
            named.setdefault(id, f"token_id:{id}" if text in named.values() else text)
        return named


def of_completion(words: Sequence[TokenLogprob], names: Names) -> Json:
    """Four lists, one entry per token; of a prompt's first token nothing is known."""
    named = [names.apart([*(id for id, _ in word.top), word.id]) for word in words]
    return {
        "tokens": [name[word.id] for word, name in zip(words, named, strict=True)],
        "token_logprobs": [None if word.logprob is None else _number(word.logprob) for word in words],
        "top_logprobs": [_top(word, name) for word, name in zip(words, named, strict=True)],
        "text_offset": [word.text_offset for word in words],
    }


def of_chat(words: Sequence[TokenLogprob], names: Names) -> Json:
    """One object per token, with its UTF-8 bytes where it is whole characters."""
    return {"content": [_entry(word, names) for word in words], "refusal": None}


def _top(word: TokenLogprob, named: dict[int, str]) -> dict[str, float] | None:
    if word.logprob is None:
        return None
    # The token itself is always there, so that a client can see whether it was the likeliest.
    return {named[id]: _number(logprob) for id, logprob in (*word.top, (word.id, word.logprob))}


def _entry(word: TokenLogprob, names: Names) -> Json:
    top = [_named(id, logprob, names) for id, logprob in word.top]
    return {**_named(word.id, word.logprob or 0.0, names), "top_logprobs": top}


def _named(id: int, logprob: float, names: Names) -> Json:
    text = names.text(id)
    whole = None if "\ufffd" in text or names.as_ids else list(text.encode())
    return {"token": text, "logprob": _number(logprob), "bytes": whole}


def _number(logprob: float) -> float:
    return max(logprob, LEAST)


STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

QUIET = 15.0
"""Seconds between comments of a stream without a first token: whoever stands between would hang up after some more."""

PING = ": ping\n\n"


@dataclass(frozen=True)
class Style:
    """How one route names and wraps text: `whole` for an answer at once, `part` for a piece of a stream."""

    prefix: str
    answer: str
    chunk: str
    whole: Callable[[str], Json]
    part: Callable[[str], Json]
    opening: Json | None
    closing: Json
    logprobs: Callable[[Sequence[TokenLogprob], Names], Json]


CHAT = Style(
    prefix="chatcmpl",
    answer="chat.completion",
    chunk="chat.completion.chunk",
    whole=lambda text: {"message": {"role": "assistant", "content": text}},
    part=lambda text: {"delta": {"content": text}},
    opening={"delta": {"role": "assistant", "content": ""}},
    closing={"delta": {}},
    logprobs=of_chat,
)
COMPLETION = Style(
    prefix="cmpl",
    answer="text_completion",
    chunk="text_completion",
    whole=lambda text: {"text": text},
    part=lambda text: {"text": text},
    opening=None,
    closing={"text": ""},
    logprobs=of_completion,
)


@dataclass(frozen=True)
class Reply:
    """One answer under way. `fingerprint` names the plan, on which the text depends as much as on the model.

    `names` are there if log-probabilities were asked for.
    """

    style: Style
    model: str
    fingerprint: Callable[[], str]
    usage: Usage
    names: Names | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    async def whole(self, pieces: AsyncIterator[TextDelta]) -> Json:
        """The answer at once, its choices in order."""
        made: dict[int, list[TextDelta]] = {}
        async for piece in pieces:
            made.setdefault(piece.index, []).append(piece)
        choices = [self._whole(index, made[index]) for index in sorted(made)]
        return self._envelope(self.style.answer, choices) | {"usage": usage_of(self.usage)}

    async def events(self, pieces: AsyncIterator[TextDelta | None], options: StreamOptions) -> AsyncGenerator[str]:
        """The answer as server-sent events, one per token, and a comment for None.

        An error on the way is an event too, and [DONE] ends all.
        """
        try:
            async for chunk in self._chunks(pieces, options):
                yield _event(chunk) if chunk else PING
        except Exception as error:
            yield _event(as_api_error(error).body)
        yield "data: [DONE]\n\n"

    async def _chunks(self, pieces: AsyncIterator[TextDelta | None], options: StreamOptions) -> AsyncGenerator[Json | None]:
        opened: set[int] = set()
        async for piece in pieces:
            if piece is None:
                yield None
                continue
            # A client takes the first chunk for the first token, so nothing may be sent before there is one.
            if self.style.opening and piece.index not in opened:
                opened.add(piece.index)
                yield self._chunk(self._choice(piece.index, self.style.opening), options)
            yield self._chunk(self._choice(piece.index, self.style.part(piece.text), words=piece.logprobs), options)
            if piece.finish_reason:
                yield self._chunk(self._choice(piece.index, self.style.closing, piece.finish_reason), options)
        if options.include_usage:
            yield self._envelope(self.style.chunk, []) | {"usage": usage_of(self.usage)}

    def _whole(self, index: int, pieces: Sequence[TextDelta]) -> Json:
        text = "".join(piece.text for piece in pieces)
        words = [word for piece in pieces for word in piece.logprobs]
        return self._choice(index, self.style.whole(text), pieces[-1].finish_reason, words)

    def _choice(self, index: int, content: Json, finish: str | None = None, words: Sequence[TokenLogprob] = ()) -> Json:
        logprobs = self.style.logprobs(words, self.names) if self.names and words else None
        return {"index": index, "finish_reason": finish, "logprobs": logprobs} | content

    def _chunk(self, choice: Json, options: StreamOptions) -> Json:
        usage = {"usage": usage_of(self.usage)} if options.continuous_usage_stats else {}
        return self._envelope(self.style.chunk, [choice]) | usage

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": f"{self.style.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint(),
            "choices": choices,
        }


async def begun(pieces: AsyncGenerator[TextDelta]) -> AsyncIterator[TextDelta | None]:
    """The same pieces, once there is a first one or its wait has lasted for QUIET seconds; then None stands for those.

    What goes wrong before is raised here, while an answer can still have a status of its own.
    """
    patient = _patient(pieces)
    return _resume(await anext(patient), patient)


async def _patient(pieces: AsyncGenerator[TextDelta]) -> AsyncGenerator[TextDelta | None]:
    async with aclosing(pieces):
        first = asyncio.ensure_future(anext(pieces))
        try:
            while not (await asyncio.wait([first], timeout=QUIET))[0]:
                yield None
        finally:
            first.cancel()
            await asyncio.wait([first])
        yield first.result()
        async for piece in pieces:
            yield piece


async def _resume(first: TextDelta | None, rest: AsyncGenerator[TextDelta | None]) -> AsyncGenerator[TextDelta | None]:
    async with aclosing(rest):
        yield first
        async for piece in rest:
            yield piece


def usage_of(usage: Usage) -> Json:
    """The tokens of a request; those that came from a declared prompt are among the prompt's."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _event(data: Json) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
