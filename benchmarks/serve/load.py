"""Load: a closed loop of clients that wait for their answers, and an open one of requests that come when they come."""

import asyncio
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import median, quantiles
from typing import Any

import httpx

from benchmarks.serve.client import Sent, complete
from benchmarks.serve.prompts import Prompt

LOOK = 0.5
"""Seconds between two looks at a server's metrics."""

_GAUGE = re.compile(r"^baklava:(num_requests_running|kv_(?:pool|promised|held)_bytes)\{[^}]*\} (\S+)$", re.M)


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
