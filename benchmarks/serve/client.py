"""A client of an OpenAI-compatible server: one streamed completion, timed token by token."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Any

import httpx


@dataclass(frozen=True)
class Sent:
    """How one request went. Times are seconds from when it was due; `arrivals` has one per token.

    `status` is HTTP's; 0 stands for an answer that broke off.
    """

    due: float
    status: int
    arrivals: tuple[float, ...]
    ended: float
    prompt: int

    @property
    def good(self) -> bool:
        """Whether it was answered."""
        return self.status == 200 and len(self.arrivals) > 1

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0]

    @property
    def tpot(self) -> float:
        """Seconds per token behind the first."""
        return (self.arrivals[-1] - self.arrivals[0]) / (len(self.arrivals) - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [after - before for before, after in pairwise(self.arrivals)]


async def complete(
    client: httpx.AsyncClient, body: dict[str, Any], prompt: int, due: float, until: float = inf
) -> Sent:
    """Send a completion and read its stream; `due` is the time.perf_counter() at which it should have been sent.

    What has not come `until` then is not waited for.
    """
    arrivals: list[float] = []
    try:
        async with (
            asyncio.timeout(max(0.0, until - time.perf_counter()) if until < inf else None),
            client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response,
        ):
            status = response.status_code
            async for event in _events(response):
                if "error" in event:
                    status = 0
                if any(choice.get("text") for choice in event.get("choices", ())):
                    arrivals.append(time.perf_counter() - due)
    except (httpx.HTTPError, TimeoutError):
        status = 0
    return Sent(due, status, tuple(arrivals), time.perf_counter() - due, prompt)


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data:") and (data := line.removeprefix("data:").strip()) != "[DONE]":
            yield json.loads(data)
