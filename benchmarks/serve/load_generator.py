"""Generate load for a server over HTTP: prompts, closed and open loops, and the latencies that clients see."""

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
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
    """A text and the number of its tokens."""

    text: str
    num_tokens: int


class PromptSampler:
    """Samples prompts from texts; no two start alike, so that a server cannot reuse one's cache for another."""

    def __init__(self, loaded: LoadedModel, texts: str, seed: int) -> None:
        self._tokenizer = loaded.tokenizer
        self._random = random.Random(seed)
        joined = "\n\n".join(document.text for document in load_documents([texts]))
        self._ids: list[int] = self._tokenizer.encode(joined, add_special_tokens=False, verbose=False)

    def sample(self, num_tokens: int) -> Prompt:
        """Return a prompt of about this many tokens."""
        if num_tokens > len(self._ids) // 2:
            raise UserError(
                f"prompts of {num_tokens} tokens need texts twice as long, but these have {len(self._ids)} tokens; "
                "name longer texts"
            )
        start = self._random.randrange(len(self._ids) - num_tokens)
        text = self._tokenizer.decode(self._ids[start : start + num_tokens])
        return Prompt(text, len(self._tokenizer.encode(text, verbose=False)))

    def sample_between(self, shortest: int, longest: int) -> Prompt:
        """Return a prompt whose length is uniform between these."""
        return self.sample(self._random.randint(shortest, longest))


@dataclass(frozen=True)
class RequestResult:
    """The outcome of one request.

    Attributes:
        due: the time.perf_counter() at which the request should be sent.
        status: HTTP status, or 0 if the answer broke off.
        token_times: seconds from `due` to each token.
        e2e_latency: seconds from `due` to the end of the answer.
    """

    due: float
    status: int
    token_times: tuple[float, ...]
    e2e_latency: float
    prompt_tokens: int

    @property
    def is_completed(self) -> bool:
        """Whether the answer is complete, and long enough for a time per token."""
        return self.status == 200 and len(self.token_times) > 1

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.token_times[0]

    @property
    def tpot(self) -> float:
        """Seconds per token after the first."""
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)

    @property
    def inter_token_latencies(self) -> list[float]:
        """Seconds between consecutive tokens."""
        return [after - before for before, after in pairwise(self.token_times)]


async def send_completion(
    client: httpx.AsyncClient, body: dict[str, Any], prompt_tokens: int, due: float, deadline: float = inf
) -> RequestResult:
    """Send a completion and read its stream until it ends, or until the `deadline` in time.perf_counter()."""
    token_times: list[float] = []
    try:
        async with (
            asyncio.timeout(max(0.0, deadline - time.perf_counter()) if deadline < inf else None),
            client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response,
        ):
            status = response.status_code
            async for event in _events(response):
                if "error" in event:
                    status = 0
                if any(choice.get("text") for choice in event.get("choices", ())):
                    token_times.append(time.perf_counter() - due)
    except (httpx.HTTPError, TimeoutError):
        status = 0
    return RequestResult(due, status, tuple(token_times), time.perf_counter() - due, prompt_tokens)


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data:") and (data := line.removeprefix("data:").strip()) != "[DONE]":
            yield json.loads(data)


METRICS_POLL_SECONDS = 0.5

GAUGE = re.compile(
    r"^baklava:(num_requests_running|kv_(?:pool|reserved|allocated|cached_prompt)_bytes)\{[^}]*\} (\S+)$", re.M
)
"""Names and values of gauges in the metrics of a server of ours with one replica."""


@dataclass(frozen=True)
class LoadResult:
    """All requests of a load, its seconds, and the highest value of each of the server's gauges."""

    requests: tuple[RequestResult, ...]
    seconds: float
    peak_gauges: dict[str, float]


def run_closed_loop(
    address: str,
    model: str,
    prompts: Sequence[Prompt],
    output_tokens: int,
    concurrency: int,
    timeout: float,
    max_seconds: float = inf,
) -> LoadResult:
    """Run `concurrency` clients that each send their next request when the last one is answered."""

    async def run(client: httpx.AsyncClient) -> list[RequestResult]:
        waiting = list(reversed(prompts))
        results: list[RequestResult] = []
        deadline = time.perf_counter() + max_seconds

        async def run_client() -> None:
            while waiting and time.perf_counter() < deadline:
                prompt = waiting.pop()
                body, due = request_body(model, prompt, output_tokens), time.perf_counter()
                results.append(await send_completion(client, body, prompt.num_tokens, due, deadline))

        await asyncio.gather(*(run_client() for _ in range(concurrency)))
        return results

    return asyncio.run(_run_with_metrics(address, run, timeout))


def run_open_loop(
    address: str, model: str, prompts: Sequence[Prompt], output_tokens: int, rate: float, seed: int, timeout: float
) -> LoadResult:
    """Send requests at random times, on average `rate` per second, whether earlier ones are answered or not."""
    generator = random.Random(seed)
    gaps = [generator.expovariate(rate) for _ in prompts]

    async def run(client: httpx.AsyncClient) -> list[RequestResult]:
        started, tasks = time.perf_counter(), []
        for index, prompt in enumerate(prompts):
            due = started + sum(gaps[:index])
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            body = request_body(model, prompt, output_tokens)
            tasks.append(asyncio.create_task(send_completion(client, body, prompt.num_tokens, due)))
        return list(await asyncio.gather(*tasks))

    return asyncio.run(_run_with_metrics(address, run, timeout))


def request_body(model: str, prompt: Prompt, output_tokens: int) -> dict[str, Any]:
    """Return the request, the same for every server; the texts are such that the model does not stop early."""
    return {"model": model, "prompt": prompt.text, "max_tokens": output_tokens, "temperature": 0}


async def _run_with_metrics(
    address: str, run: Callable[[httpx.AsyncClient], Awaitable[list[RequestResult]]], timeout: float
) -> LoadResult:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=timeout, limits=limits) as client:
        peak_gauges: dict[str, float] = {}
        poller = asyncio.create_task(_poll_metrics(client, peak_gauges))
        started = time.perf_counter()
        results = await run(client)
        seconds = time.perf_counter() - started
        poller.cancel()
    return LoadResult(tuple(results), seconds, peak_gauges)


async def _poll_metrics(client: httpx.AsyncClient, peak_gauges: dict[str, float]) -> None:
    """Record the highest value of each gauge; return if the server has no metrics."""
    while True:
        try:
            response = await client.get("/metrics")
        except httpx.HTTPError:
            return
        if response.status_code != 200:
            return
        for name, value in GAUGE.findall(response.text):
            peak_gauges[name] = max(peak_gauges.get(name, 0.0), float(value))
        await asyncio.sleep(METRICS_POLL_SECONDS)


def summarize(load: LoadResult, max_ttft: float, max_tpot: float) -> dict[str, Any]:
    """Return latencies as percentiles in seconds, and rates per second.

    Times between tokens include those of answers cut off by the end of the load; all else is of complete answers.
    """
    completed = [request for request in load.requests if request.is_completed]
    with_tokens = [request for request in load.requests if len(request.token_times) > 1]
    good = [request for request in completed if request.ttft <= max_ttft and request.tpot <= max_tpot]
    return {
        "requests": len(load.requests),
        "completed": len(completed),
        "rejected": sum(request.status == 429 for request in load.requests),
        "failed": sum(not request.is_completed and request.status != 429 for request in load.requests),
        "seconds": load.seconds,
        "ttft": percentiles([request.ttft for request in completed]),
        "tpot": percentiles([request.tpot for request in with_tokens]),
        "itl": percentiles([latency for request in with_tokens for latency in request.inter_token_latencies]),
        "e2e_latency": percentiles([request.e2e_latency for request in completed]),
        "requests_per_second": len(completed) / load.seconds,
        "tokens_per_second": sum(len(request.token_times) for request in completed) / load.seconds,
        "goodput": len(good) / load.seconds,
        "peak_gauges": load.peak_gauges,
    }


def failed_load(reason: str, num_requests: int) -> dict[str, Any]:
    """Return the summary of a server that took none of the requests."""
    requests = tuple(RequestResult(0.0, 0, (), 0.0, 0) for _ in range(num_requests))
    return summarize(LoadResult(requests, inf, {}), inf, inf) | {"seconds": None, "error": reason}


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Return the median, 90th and 99th percentile, or None if there are no values."""
    if len(values) < 2:
        return {name: value for value in values for name in ("p50", "p90", "p99")} or None
    cuts = quantiles(values, n=100, method="inclusive")
    return {"p50": median(values), "p90": cuts[89], "p99": cuts[98]}
