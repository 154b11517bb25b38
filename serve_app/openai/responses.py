"""Response bodies of chats and completions: at once or as server-sent events, with log-probabilities and usage."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from serve_app.openai.detokenizer import TextDelta, TokenLogprob
from serve_app.openai.errors import to_api_error
from serve_app.openai.output_processor import Usage
from serve_app.openai.protocol import StreamOptions

Json = dict[str, Any]

MIN_LOGPROB = -9999.0
"""Written for minus infinity, which JSON cannot express."""

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

KEEPALIVE_SECONDS = 15.0
"""Interval of the comments in a stream that waits for its first token, so that no proxy closes the connection."""

KEEPALIVE_COMMENT = ": ping\n\n"


@dataclass(frozen=True)
class TokenNamer:
    """Write tokens as text, or, with `as_ids`, as `token_id:7`."""

    tokenizer: Any
    as_ids: bool = False

    def text(self, token_id: int, starts_text: bool) -> str:
        """Return what a token writes at the start of a text, or in its middle. Half a character is U+FFFD."""
        if self.as_ids:
            return f"token_id:{token_id}"
        alone = self._decode([token_id])
        return alone if starts_text else self._decode([token_id, token_id])[len(alone) :]

    def unique_names(self, ids: Sequence[int], starts_text: bool) -> dict[int, str]:
        """Return a different name for each token: of those with the same text, only the first is named by it.

        Clients tell tokens apart by these names, and look for the most likely one among them.
        """
        names: dict[int, str] = {}
        for token_id in ids:
            text = self.text(token_id, starts_text)
            names.setdefault(token_id, f"token_id:{token_id}" if text in names.values() else text)
        return names

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def completion_logprobs(tokens: Sequence[TokenLogprob], namer: TokenNamer) -> Json:
    """Return four lists with an entry per token. The first token of a prompt has no log-probability."""
    result: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        names = namer.unique_names([*(token_id for token_id, _ in token.top), token.token_id], token.starts_text)
        result["tokens"].append(names[token.token_id])
        result["text_offset"].append(token.text_offset)
        if token.logprob is None:
            result["token_logprobs"].append(None)
            result["top_logprobs"].append(None)
        else:
            # The token itself is always included, so that a client can see whether it was the most likely.
            alternatives = (*token.top, (token.token_id, token.logprob))
            result["token_logprobs"].append(max(token.logprob, MIN_LOGPROB))
            result["top_logprobs"].append(
                {names[token_id]: max(logprob, MIN_LOGPROB) for token_id, logprob in alternatives}
            )
    return result


def chat_logprobs(tokens: Sequence[TokenLogprob], namer: TokenNamer) -> Json:
    """Return an object per token, with its UTF-8 bytes if it consists of whole characters."""

    def entry(token_id: int, logprob: float, starts_text: bool) -> Json:
        text = namer.text(token_id, starts_text)
        utf8 = None if "\ufffd" in text or namer.as_ids else list(text.encode())
        return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": utf8}

    content = [
        entry(token.token_id, token.logprob or 0.0, token.starts_text)
        | {"top_logprobs": [entry(*alternative, token.starts_text) for alternative in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


@dataclass(frozen=True)
class ResponseFormat:
    """How one route names and wraps text: `complete` in an answer at once, `delta` in a chunk of a stream.

    `first_chunk`, if any, precedes the first text of a choice, and `last_chunk` carries its finish reason.
    """

    id_prefix: str
    object_name: str
    chunk_object_name: str
    complete: Callable[[str], Json]
    delta: Callable[[str], Json]
    first_chunk: Json | None
    last_chunk: Json
    logprobs: Callable[[Sequence[TokenLogprob], TokenNamer], Json]


CHAT = ResponseFormat(
    id_prefix="chatcmpl",
    object_name="chat.completion",
    chunk_object_name="chat.completion.chunk",
    complete=lambda text: {"message": {"role": "assistant", "content": text}},
    delta=lambda text: {"delta": {"content": text}},
    first_chunk={"delta": {"role": "assistant", "content": ""}},
    last_chunk={"delta": {}},
    logprobs=chat_logprobs,
)
COMPLETION = ResponseFormat(
    id_prefix="cmpl",
    object_name="text_completion",
    chunk_object_name="text_completion",
    complete=lambda text: {"text": text},
    delta=lambda text: {"text": text},
    first_chunk=None,
    last_chunk={"text": ""},
    logprobs=completion_logprobs,
)


@dataclass(frozen=True)
class ResponseBuilder:
    """Build the response to one request.

    `fingerprint` names the plan, on which the text depends as much as on the model. `namer` is set if
    log-probabilities were requested.
    """

    format: ResponseFormat
    model: str
    fingerprint: Callable[[], str]
    usage: Usage
    namer: TokenNamer | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    async def complete(self, deltas: AsyncIterator[TextDelta]) -> Json:
        """Return the answer at once, with its choices in order."""
        by_choice: dict[int, list[TextDelta]] = {}
        async for delta in deltas:
            by_choice.setdefault(delta.index, []).append(delta)
        choices = []
        for index, parts in sorted(by_choice.items()):
            content = self.format.complete("".join(part.text for part in parts))
            logprobs = [token for part in parts for token in part.logprobs]
            choices.append(self._choice(index, content, parts[-1].finish_reason, logprobs))
        return self._envelope(self.format.object_name, choices) | {"usage": usage_json(self.usage)}

    async def stream(self, deltas: AsyncIterator[TextDelta | None], options: StreamOptions) -> AsyncGenerator[str]:
        """Yield the answer as server-sent events, one per token, and a comment for None.

        An error becomes an event as well, and [DONE] ends the stream in any case.
        """
        try:
            async for chunk in self._chunks(deltas, options):
                yield _event(chunk) if chunk else KEEPALIVE_COMMENT
        except Exception as error:
            yield _event(to_api_error(error).body)
        yield "data: [DONE]\n\n"

    async def _chunks(
        self, deltas: AsyncIterator[TextDelta | None], options: StreamOptions
    ) -> AsyncGenerator[Json | None]:
        started: set[int] = set()
        async for delta in deltas:
            if delta is None:
                yield None
                continue
            # Clients take the first chunk for the first token, so nothing may be sent before there is one.
            if self.format.first_chunk and delta.index not in started:
                started.add(delta.index)
                yield self._chunk(self._choice(delta.index, self.format.first_chunk), options)
            content = self.format.delta(delta.text)
            yield self._chunk(self._choice(delta.index, content, logprobs=delta.logprobs), options)
            if delta.finish_reason:
                choice = self._choice(delta.index, self.format.last_chunk, delta.finish_reason)
                yield self._chunk(choice, options)
        if options.include_usage:
            yield self._envelope(self.format.chunk_object_name, []) | {"usage": usage_json(self.usage)}

    def _choice(
        self, index: int, content: Json, finish_reason: str | None = None, logprobs: Sequence[TokenLogprob] = ()
    ) -> Json:
        written = self.format.logprobs(logprobs, self.namer) if self.namer and logprobs else None
        return {"index": index, "finish_reason": finish_reason, "logprobs": written} | content

    def _chunk(self, choice: Json, options: StreamOptions) -> Json:
        usage = {"usage": usage_json(self.usage)} if options.continuous_usage_stats else {}
        return self._envelope(self.format.chunk_object_name, [choice]) | usage

    def _envelope(self, object_name: str, choices: list[Json]) -> Json:
        return {
            "id": f"{self.format.id_prefix}-{self.id}",
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint(),
            "choices": choices,
        }


async def await_first_delta(deltas: AsyncGenerator[TextDelta]) -> AsyncIterator[TextDelta | None]:
    """Return the same deltas once there is a first one, or after KEEPALIVE_SECONDS; None then stands for that wait.

    An error before that is raised here, while the response can still have a status of its own.
    """
    with_keepalive = _with_keepalive(deltas)
    first = await anext(with_keepalive)

    async def resume() -> AsyncGenerator[TextDelta | None]:
        async with aclosing(with_keepalive):
            yield first
            async for delta in with_keepalive:
                yield delta

    return resume()


async def _with_keepalive(deltas: AsyncGenerator[TextDelta]) -> AsyncGenerator[TextDelta | None]:
    async with aclosing(deltas):
        first = asyncio.ensure_future(anext(deltas))
        try:
            while not (await asyncio.wait([first], timeout=KEEPALIVE_SECONDS))[0]:
                yield None
        finally:
            first.cancel()
            await asyncio.wait([first])
        yield first.result()
        async for delta in deltas:
            yield delta


def usage_json(usage: Usage) -> Json:
    """Return the token counts of a request. Tokens from the prefix cache are part of the prompt's."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _event(data: Json) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
