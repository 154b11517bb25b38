"""The JSON of answers and the events of streams, as OpenAI's clients read them."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from serve_app.errors import as_api_error
from serve_app.schema import StreamOptions
from serve_app.text import Piece

Json = dict[str, Any]

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


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


CHAT = Style(
    prefix="chatcmpl",
    answer="chat.completion",
    chunk="chat.completion.chunk",
    whole=lambda text: {"message": {"role": "assistant", "content": text}},
    part=lambda text: {"delta": {"content": text}},
    opening={"delta": {"role": "assistant", "content": ""}},
    closing={"delta": {}},
)
COMPLETION = Style(
    prefix="cmpl",
    answer="text_completion",
    chunk="text_completion",
    whole=lambda text: {"text": text},
    part=lambda text: {"text": text},
    opening=None,
    closing={"text": ""},
)


@dataclass(frozen=True)
class Reply:
    """One answer under way. `fingerprint` names the plan, on which the text depends as much as on the model."""

    style: Style
    model: str
    fingerprint: str
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    async def whole(self, pieces: AsyncIterator[Piece]) -> Json:
        """The answer at once."""
        made = [piece async for piece in pieces]
        text = "".join(piece.text for piece in made)
        answer = self._envelope(self.style.answer, [_choice(self.style.whole(text), made[-1].finish)])
        return answer | {"usage": self._usage(len(made))}

    async def events(self, pieces: AsyncIterator[Piece], options: StreamOptions) -> AsyncGenerator[str]:
        """The answer as server-sent events, one per token; an error on the way is an event too, and [DONE] ends all."""
        try:
            async for chunk in self._chunks(pieces, options):
                yield _event(chunk)
        except Exception as error:
            yield _event(as_api_error(error).body)
        yield "data: [DONE]\n\n"

    async def _chunks(self, pieces: AsyncIterator[Piece], options: StreamOptions) -> AsyncGenerator[Json]:
        made = 0
        async for piece in pieces:
            # A client takes the first chunk for the first token, so nothing may be sent before there is one.
            if made == 0 and self.style.opening:
                yield self._chunk(_choice(self.style.opening, None), 0, options)
            made += 1
            yield self._chunk(_choice(self.style.part(piece.text), None), made, options)
            if piece.finish:
                yield self._chunk(_choice(self.style.closing, piece.finish), made, options)
        if options.include_usage:
            yield self._envelope(self.style.chunk, []) | {"usage": self._usage(made)}

    def _chunk(self, choice: Json, made: int, options: StreamOptions) -> Json:
        usage = {"usage": self._usage(made)} if options.continuous_usage_stats else {}
        return self._envelope(self.style.chunk, [choice]) | usage

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": f"{self.style.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _usage(self, made: int) -> Json:
        prompt = self.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _choice(content: Json, finish: str | None) -> Json:
    return {"index": 0, "finish_reason": finish, "logprobs": None} | content


def _event(data: Json) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
