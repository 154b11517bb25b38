"""Turn the engine's outputs into text deltas: the engine's thread on one side, an event loop on the other."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from serve_app.engine.types import (
    DeadlineError,
    EngineOutput,
    EngineRequest,
    OutputCallback,
    PrefillDone,
    RequestHandle,
    TokenOutput,
)
from serve_app.openai.detokenizer import IncrementalDetokenizer, TextDelta, prompt_token_logprobs
from serve_app.openai.tokenization import Prompt

DEADLINE_GRACE_SECONDS = 5.0
"""Time after a deadline in which the engine itself reports it. After that the request fails without the engine."""

_NumberedOutput = tuple[int, EngineOutput]


class EngineClient(Protocol):
    """The part of the engine that a request needs."""

    def submit(self, *requests: tuple[EngineRequest, OutputCallback]) -> Sequence[RequestHandle]:
        """Accept all of these requests or none."""


@dataclass
class Usage:
    """Tokens of a request so far, over all its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass
class OutputProcessor:
    """The answer to one HTTP request: an engine request per prompt. Choices are numbered across all prompts.

    `stop_strings` end a text. With `echo` each choice begins with its prompt.
    """

    tokenizer: Any
    prompts: Sequence[Prompt]
    requests: Sequence[EngineRequest]
    stop_strings: Sequence[str] = ()
    echo: bool = False
    usage: Usage = field(init=False)
    _detokenizers: dict[int, IncrementalDetokenizer] = field(default_factory=dict, init=False)
    _echoes: dict[int, TextDelta] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.usage = Usage(sum(len(request.prompt) for request in self.requests))

    async def deltas(self, engine: EngineClient) -> AsyncGenerator[TextDelta]:
        """Yield one delta per token until each choice has a finish reason.

        Closing or cancelling this, as a client's disconnect does, ends the request within one engine step.

        Raises:
            RequestRejected: The engine rejects the request or does not finish it in time.
        """
        group = RequestGroup(self.requests)
        async with contextlib.aclosing(group.outputs(engine)) as outputs:
            async for number, output in outputs:
                if isinstance(output, PrefillDone):
                    # Decoding a long prompt takes a while, and the loop serves other requests.
                    deltas = await asyncio.to_thread(self._on_prefill_done, number, output)
                else:
                    deltas = self._on_token(number, output)
                for delta in deltas:
                    if isinstance(output, TokenOutput) and delta.finish_reason and not output.finish_reason:
                        group.stop_sequence(number, output.index)  # at a stop string, of which the engine knows nothing
                    yield delta

    def _on_prefill_done(self, number: int, prefill: PrefillDone) -> list[TextDelta]:
        """Start the choices of a prompt. Return a delta for each if no token is to be generated."""
        request = self.requests[number]
        self.usage.cached_tokens += prefill.cached_tokens
        text = self.prompts[number].text if self.echo else ""
        logprobs = (
            prompt_token_logprobs(self.tokenizer, request.prompt, prefill.prompt_logprobs)
            if prefill.prompt_logprobs
            else ()
        )
        first = self._choice_index(number, 0)
        for index in range(first, first + request.n):
            self._detokenizers[index] = IncrementalDetokenizer(
                self.tokenizer, request.prompt, self.stop_strings, len(text), request.sampling_params.min_tokens
            )
        deltas = [TextDelta(text, index, prefill.finish_reason, logprobs) for index in range(first, first + request.n)]
        if self.echo:
            self._echoes |= {delta.index: delta for delta in deltas}
        return deltas if prefill.finish_reason else []

    def _on_token(self, number: int, token: TokenOutput) -> list[TextDelta]:
        """Return what a token adds: nothing if a stop string ended its text before the engine knew of it."""
        index = self._choice_index(number, token.index)
        detokenizer = self._detokenizers[index]
        if detokenizer.finish_reason:
            return []
        self.usage.completion_tokens += 1
        delta = replace(detokenizer.add_token(token), index=index)
        # The echo goes with the first token, because clients take the first delta for it.
        if (echo := self._echoes.pop(index, None)) is not None:
            delta = replace(delta, text=echo.text + delta.text, logprobs=echo.logprobs + delta.logprobs)
        return [delta]

    def _choice_index(self, number: int, sequence: int) -> int:
        return sum(request.n for request in self.requests[:number]) + sequence


class RequestGroup:
    """Requests that are submitted to an engine together. A sequence is open until it has its finish reason."""

    def __init__(self, requests: Sequence[EngineRequest]) -> None:
        self._requests = requests
        self._handles: list[RequestHandle] = []
        self._open_sequences = {number: set(range(request.n)) for number, request in enumerate(requests)}

    async def outputs(self, engine: EngineClient) -> AsyncGenerator[tuple[int, PrefillDone | TokenOutput]]:
        """Submit the requests, and yield each output with the number of its request, until no sequence is open.

        Raises:
            RequestRejected: As the engine does. The other requests are then cancelled, as they are on closing this.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[_NumberedOutput] = asyncio.Queue()
        deadline = max(request.deadline for request in self._requests)

        def put(number: int, output: EngineOutput) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and its readers with it
                loop.call_soon_threadsafe(queue.put_nowait, (number, output))

        try:
            self._handles = list(
                engine.submit(*((request, partial(put, number)) for number, request in enumerate(self._requests)))
            )
            while self._open_sequences:
                number, output = await _get_until(queue, deadline)
                if number not in self._open_sequences:
                    continue
                if isinstance(output, Exception):
                    self._close(number, None)
                    raise output
                if output.finish_reason:  # that of a prefill ends all sequences of the prompt
                    self._close(number, None if isinstance(output, PrefillDone) else output.index)
                yield number, output
        finally:
            for number, handle in enumerate(self._handles):
                if number in self._open_sequences:
                    handle.cancel()

    def stop_sequence(self, number: int, index: int) -> None:
        """End one sequence, whose text is complete, before the engine would."""
        self._handles[number].stop_sequence(index)
        self._close(number, index)

    def _close(self, number: int, index: int | None) -> None:
        remaining = self._open_sequences.get(number, set())
        remaining -= remaining if index is None else {index}
        if not remaining:
            self._open_sequences.pop(number, None)


async def _get_until(queue: "asyncio.Queue[_NumberedOutput]", deadline: float) -> _NumberedOutput:
    timeout = None if deadline == float("inf") else max(0.0, deadline - time.monotonic()) + DEADLINE_GRACE_SECONDS
    try:
        async with asyncio.timeout(timeout):  # Python 3.11's wait_for loses a cancellation if an output comes with it
            return await queue.get()
    except TimeoutError:
        raise DeadlineError(was_waiting=False) from None
