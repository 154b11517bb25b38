"""Prompts out of the demo texts, cut to so many tokens."""

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from statistics import median, quantiles
from typing import Any

import httpx

from baklava.data.documents import load_documents
from baklava.errors import UserError
from baklava.runtime.model_loader import LoadedModel


@dataclass(frozen=True)
class Prompt:
    """A text, and how many tokens it has."""

    text: str
    tokens: int


class Prompts:
    """Draws prompts; no two begin alike, so that no server can take one's cache for another."""

    def __init__(self, loaded: LoadedModel, texts: str, seed: int) -> None:
        self._tokenizer, self._draws = loaded.tokenizer, random.Random(seed)
        joined = "\n\n".join(document.text for document in load_documents([texts]))
        self._ids: list[int] = self._tokenizer.encode(joined, add_special_tokens=False, verbose=False)

    def of(self, tokens: int) -> Prompt:
        """A prompt of about so many tokens."""
        if tokens > len(self._ids) // 2:
            raise UserError(f"prompts of {tokens} tokens out of texts of {len(self._ids)}; name longer texts")
        start = self._draws.randrange(len(self._ids) - tokens)
        text = self._tokenizer.decode(self._ids[start : start + tokens])
        return Prompt(text, len(self._tokenizer.encode(text, verbose=False)))

    def between(self, fewest: int, most: int) -> Prompt:
        """A prompt of any length between these, all as likely."""
        return self.of(self._draws.randint(fewest, most))


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


LOOK = 0.5
"""Seconds between two looks at a server's metrics."""

_GAUGE = re.compile(r"^baklava:(num_requests_running|kv_(?:pool|reserved|allocated)_bytes)\{[^}]*\} (\S+)$", re.M)


@dataclass(frozen=True)
class Ran:
    """All requests of a run, its seconds, and the most that the server was seen to run and to hold."""

    sent: tuple[Sent, ...]
    seconds: float
    gauges: dict[str, float]


def closed(
    address: str,
    model: str,
    prompts: Sequence[Prompt],
    tokens: int,
    concurrent: int,
    timeout: float,
    limit: float = inf,
) -> Ran:
    """So many clients, each of which sends its next request when the last one is answered; all stop at the limit."""

    async def run(client: httpx.AsyncClient) -> list[Sent]:
        waiting, sent, until = list(reversed(prompts)), list[Sent](), time.perf_counter() + limit

        async def one() -> None:
            while waiting and time.perf_counter() < until:
                prompt = waiting.pop()
                now = time.perf_counter()
                sent.append(await complete(client, body(model, prompt, tokens), prompt.tokens, now, until))

        await asyncio.gather(*(one() for _ in range(concurrent)))
        return sent

    return asyncio.run(_watched(address, run, timeout))


def opened(
    address: str, model: str, prompts: Sequence[Prompt], tokens: int, rate: float, seed: int, timeout: float
) -> Ran:
    """Requests at random times, `rate` a second on average, whether the ones before are answered or not."""
    draws = random.Random(seed)
    gaps = [draws.expovariate(rate) for _ in prompts]

    async def run(client: httpx.AsyncClient) -> list[Sent]:
        start, sent = time.perf_counter(), []
        for place, prompt in enumerate(prompts):
            due = start + sum(gaps[:place])
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            sent.append(asyncio.create_task(complete(client, body(model, prompt, tokens), prompt.tokens, due)))
        return list(await asyncio.gather(*sent))

    return asyncio.run(_watched(address, run, timeout))


def body(model: str, prompt: Prompt, tokens: int) -> dict[str, Any]:
    """The same for every server; the texts are such that the model goes on."""
    return {"model": model, "prompt": prompt.text, "max_tokens": tokens, "temperature": 0}


async def _watched(address: str, run: Any, timeout: float) -> Ran:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=timeout, limits=limits) as client:
        gauges: dict[str, float] = {}
        watch = asyncio.create_task(_watch(client, gauges))
        started = time.perf_counter()
        sent = await run(client)
        seconds = time.perf_counter() - started
        watch.cancel()
    return Ran(tuple(sent), seconds, gauges)


async def _watch(client: httpx.AsyncClient, most: dict[str, float]) -> None:
    """Keep the highest of each gauge; a server without metrics has none."""
    while True:
        try:
            answer = await client.get("/metrics")
        except httpx.HTTPError:
            return
        if answer.status_code != 200:
            return
        for name, value in _GAUGE.findall(answer.text):
            most[name] = max(most.get(name, 0.0), float(value))
        await asyncio.sleep(LOOK)


def figures(ran: Ran, ttft: float, tpot: float) -> dict[str, Any]:
    """What a run says: medians and 99th percentiles in seconds, rates per second.

    Times between tokens are also of answers that were not waited for to their end; all else is of whole ones.
    """
    good = [each for each in ran.sent if each.good]
    timed = [each for each in ran.sent if len(each.arrivals) > 1]
    met = [each for each in good if each.ttft <= ttft and each.tpot <= tpot]
    return {
        "requests": len(ran.sent),
        "answered": len(good),
        "refused": sum(each.status == 429 for each in ran.sent),
        "failed": sum(not each.good and each.status != 429 for each in ran.sent),
        "seconds": ran.seconds,
        "ttft": spread([each.ttft for each in good]),
        "tpot": spread([each.tpot for each in timed]),
        "gap": spread([gap for each in timed for gap in each.gaps]),
        "whole": spread([each.ended for each in good]),
        "requests_per_second": len(good) / ran.seconds,
        "tokens_per_second": sum(len(each.arrivals) for each in good) / ran.seconds,
        "goodput": len(met) / ran.seconds,
        "most": ran.gauges,
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median and high percentiles."""
    if len(values) < 2:
        return {name: value for value in values for name in ("p50", "p90", "p99")} or None
    cuts = quantiles(values, n=100, method="inclusive")
    return {"p50": median(values), "p90": cuts[89], "p99": cuts[98]}
