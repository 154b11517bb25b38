"""The JSON of answers and the events of streams, as OpenAI's clients read them."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from serve_app.errors import as_api_error
from serve_app.generation import Usage
from serve_app.likely import Json, Names, of_chat, of_completion
from serve_app.schema import StreamOptions
from serve_app.text import Piece, Word

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
    logprobs: Callable[[Sequence[Word], Names], Json]


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

    async def whole(self, pieces: AsyncIterator[Piece]) -> Json:
        """The answer at once, its choices in order."""
        made: dict[int, list[Piece]] = {}
        async for piece in pieces:
            made.setdefault(piece.index, []).append(piece)
        choices = [self._whole(index, made[index]) for index in sorted(made)]
        return self._envelope(self.style.answer, choices) | {"usage": usage_of(self.usage)}

    async def events(self, pieces: AsyncIterator[Piece | None], options: StreamOptions) -> AsyncGenerator[str]:
        """The answer as server-sent events, one per token, and a comment for None.

        An error on the way is an event too, and [DONE] ends all.
        """
        try:
            async for chunk in self._chunks(pieces, options):
                yield _event(chunk) if chunk else PING
        except Exception as error:
            yield _event(as_api_error(error).body)
        yield "data: [DONE]\n\n"

    async def _chunks(self, pieces: AsyncIterator[Piece | None], options: StreamOptions) -> AsyncGenerator[Json | None]:
        opened: set[int] = set()
        async for piece in pieces:
            if piece is None:
                yield None
                continue
            # A client takes the first chunk for the first token, so nothing may be sent before there is one.
            if self.style.opening and piece.index not in opened:
                opened.add(piece.index)
                yield self._chunk(self._choice(piece.index, self.style.opening), options)
            yield self._chunk(self._choice(piece.index, self.style.part(piece.text), words=piece.words), options)
            if piece.finish:
                yield self._chunk(self._choice(piece.index, self.style.closing, piece.finish), options)
        if options.include_usage:
            yield self._envelope(self.style.chunk, []) | {"usage": usage_of(self.usage)}

    def _whole(self, index: int, pieces: Sequence[Piece]) -> Json:
        text = "".join(piece.text for piece in pieces)
        words = [word for piece in pieces for word in piece.words]
        return self._choice(index, self.style.whole(text), pieces[-1].finish, words)

    def _choice(self, index: int, content: Json, finish: str | None = None, words: Sequence[Word] = ()) -> Json:
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


async def begun(pieces: AsyncGenerator[Piece]) -> AsyncIterator[Piece | None]:
    """The same pieces, once there is a first one or its wait has lasted for QUIET seconds; then None stands for those.

    What goes wrong before is raised here, while an answer can still have a status of its own.
    """
    patient = _patient(pieces)
    return _resume(await anext(patient), patient)


async def _patient(pieces: AsyncGenerator[Piece]) -> AsyncGenerator[Piece | None]:
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


async def _resume(first: Piece | None, rest: AsyncGenerator[Piece | None]) -> AsyncGenerator[Piece | None]:
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
