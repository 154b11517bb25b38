"""From requests to the pieces of their answers: the engine's thread on one side, an event loop on the other."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from serve_app.engine.types import DeadlineError, OutputCallback, EngineOutput, RequestHandle, PrefillDone, TokenOutput, EngineRequest
from serve_app.openai.detokenizer import TextDelta, IncrementalDetokenizer, prompt_token_logprobs
from serve_app.openai.tokenization import Prompt

DEADLINE_GRACE_SECONDS = 5.0
"""Seconds after a deadline by which the engine has said so; after that it is not waited for."""

_Arrived = tuple[int, EngineOutput]


class EngineClient(Protocol):
    """What is needed of an engine."""

    def submit(self, *asked: tuple[EngineRequest, OutputCallback]) -> Sequence[RequestHandle]:
        """Take requests in, all or none of them."""


@dataclass
class Usage:
    """Tokens of a request so far, over all its prompts and continuations."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass
class OutputProcessor:
    """The answer to one request: a `Work` per prompt, whose continuations are numbered through.

    `stops` are the strings that end a text; with `echo` each continuation begins with its prompt.
    """

    tokenizer: Any
    prompts: Sequence[Prompt]
    requests: Sequence[EngineRequest]
    stops: Sequence[str] = ()
    echo: bool = False
    usage: Usage = field(init=False)
    _writers: dict[int, IncrementalDetokenizer] = field(default_factory=dict, init=False)
    _echoes: dict[int, TextDelta] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.usage = Usage(sum(len(work.prompt) for work in self.requests))

    async def deltas(self, engine: EngineClient) -> AsyncGenerator[TextDelta]:
        """The pieces as they are made, one per token, until every continuation has its finish.

        Closing or cancelling this, as a client's disconnect does, ends the request within a step of the engine.

        Raises:
            Refusal: the engine does not begin with it or does not end it in time.
        """
        asked = RequestGroup(self.requests)
        async with contextlib.aclosing(asked.events(engine)) as arriving:
            async for number, event in arriving:
                if isinstance(event, PrefillDone):  # a long prompt takes a while to spell out, and others wait for the loop
                    made = await asyncio.to_thread(self._opened, number, event)
                else:
                    made = self._written(number, event)
                for piece in made:
                    if piece.finish_reason and isinstance(event, TokenOutput) and not event.finish_reason:  # a stop string
                        asked.complete(number, event.index)
                    yield piece

    def _opened(self, number: int, started: PrefillDone) -> list[TextDelta]:
        """Begin the continuations of a prompt; they are pieces already if nothing is to be generated."""
        self.usage.cached_tokens += started.cached_tokens
        text = self.prompts[number].text if self.echo else ""
        logprobs = started.prompt_logprobs
        words = prompt_token_logprobs(self.tokenizer, self.requests[number].prompt, logprobs) if logprobs else ()
        first = self._index(number, 0)
        opened = [TextDelta(text, first + one, started.finish_reason, words) for one in range(self.requests[number].n)]
        least = self.requests[number].sampling_params.min_tokens
        self._writers |= {piece.index: IncrementalDetokenizer(self.tokenizer, self.stops, len(text), least) for piece in opened}
        self._echoes |= {piece.index: piece for piece in opened if self.echo}
        return opened if started.finish_reason else []

    def _written(self, number: int, token: TokenOutput) -> list[TextDelta]:
        """What a token adds; nothing if a stop string has ended its text, and the engine has not heard of it yet."""
        index = self._index(number, token.index)
        if self._writers[index].finish_reason:
            return []
        self.usage.completion_tokens += 1
        piece = replace(self._writers[index].add_token(token), index=index)
        # What is echoed goes with the first token: a client takes the first piece for it.
        if (echo := self._echoes.pop(index, None)) is not None:
            piece = replace(piece, text=echo.text + piece.text, words=echo.logprobs + piece.logprobs)
        return [piece]

    def _index(self, number: int, index: int) -> int:
        return sum(work.n for work in self.requests[:number]) + index


class RequestGroup:
    """Requests that are asked of an engine together. A continuation is open until it has its finish."""

    def __init__(self, works: Sequence[EngineRequest]) -> None:
        self._works, self._handles = works, list[RequestHandle]()
        self._open = {number: set(range(work.n)) for number, work in enumerate(works)}

    async def events(self, engine: EngineClient) -> AsyncGenerator[tuple[int, PrefillDone | TokenOutput]]:
        """What the engine makes of them, each event with the number of its request, until no continuation is open.

        Raises:
            Refusal: as the engine does; the other requests are cancelled then, as they are when this is closed.
        """
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[_Arrived] = asyncio.Queue()
        latest = max(work.deadline for work in self._works)
        try:
            asked = ((work, partial(_hand_over, loop, arrived, number)) for number, work in enumerate(self._works))
            self._handles = list(engine.submit(*asked))
            while self._open:
                number, event = await _next(arrived, latest)
                if number not in self._open:
                    continue
                if isinstance(event, Exception):
                    self._close(number, None)
                    raise event
                if event.finish_reason:  # of a prompt alone, that ends all of its continuations
                    self._close(number, None if isinstance(event, PrefillDone) else event.index)
                yield number, event
        finally:
            for number, handle in enumerate(self._handles):
                if number in self._open:
                    handle.cancel()

    def complete(self, number: int, index: int) -> None:
        """One continuation has all the text that it needs, whatever the engine would still make of it."""
        self._handles[number].stop_sequence(index)
        self._close(number, index)

    def _close(self, number: int, index: int | None) -> None:
        still = self._open.get(number, set())
        still -= still if index is None else {index}
        if not still:
            self._open.pop(number, None)


async def _next(arrived: "asyncio.Queue[_Arrived]", latest: float) -> _Arrived:
    patience = None if latest == float("inf") else max(0.0, latest - time.monotonic()) + DEADLINE_GRACE_SECONDS
    try:
        return await asyncio.wait_for(arrived.get(), patience)
    except TimeoutError:
        raise DeadlineError(waiting=False) from None


def _hand_over(loop: asyncio.AbstractEventLoop, arrived: "asyncio.Queue[_Arrived]", number: int, event: EngineOutput) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended, and whoever waited with it
        loop.call_soon_threadsafe(arrived.put_nowait, (number, event))
