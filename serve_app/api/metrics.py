"""Prometheus metrics under vLLM's names, with `baklava:` for `vllm:`, so that its dashboards need one replacement.

Each metric has the labels `model_name` and `replica`.
"""

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baklava.plan.budget_plan import BudgetPlan
from serve_app.engine.types import (
    EngineOutput,
    EngineRequest,
    EngineState,
    OutputCallback,
    PrefillDone,
    RequestHandle,
)
from serve_app.openai.detokenizer import TextDelta
from serve_app.openai.errors import ApiError, to_api_error
from serve_app.openai.output_processor import EngineClient, Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LABELS = ("model_name", "replica")

# vLLM's buckets, so that the same panels fit
_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640),
)
_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST_SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKEN_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """The metrics of one replica. `state` and `plan` are read at each scrape."""

    def __init__(
        self, model: str, replica: str, state: Callable[[], EngineState], plan: Callable[[], BudgetPlan]
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector((model, replica), state, plan))
        self._labels = (model, replica)
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Time from arrival to the first token.", _FIRST_TOKEN_SECONDS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Time between two tokens of a sequence.", _TOKEN_SECONDS
        )
        self.e2e_latency = self._histogram(
            "e2e_request_latency_seconds", "Time from arrival to the end of the request.", _REQUEST_SECONDS
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "Time from arrival to admission.", _REQUEST_SECONDS
        )
        self.prefill_time = self._histogram(
            "request_prefill_time_seconds", "Time from admission to the first token.", _REQUEST_SECONDS
        )
        self.decode_time = self._histogram(
            "request_decode_time_seconds", "Time from the first token to the last.", _REQUEST_SECONDS
        )
        self.inference_time = self._histogram(
            "request_inference_time_seconds", "Time from admission to the last token.", _REQUEST_SECONDS
        )
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens per request.", _TOKEN_COUNTS)
        self.generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens per request.", _TOKEN_COUNTS
        )
        self._finished = self._counter("request_success", "Finished sequences.", "finished_reason")
        self._rejected = self._counter(
            "admission_rejections", "Requests that failed before their first token.", "status"
        )

    @property
    def text(self) -> str:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry).decode()

    def count_finished(self, reason: str) -> None:
        """Count a sequence that ended: stop, length, abort (the client disconnected) or error."""
        self._finished.labels(*self._labels, reason).inc()

    def count_rejected(self, status: int) -> None:
        """Count a request that ended with this status before its first token."""
        self._rejected.labels(*self._labels, str(status)).inc()

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...]) -> Any:
        histogram = Histogram(f"baklava:{name}", description, _LABELS, registry=self._registry, buckets=buckets)
        return histogram.labels(*self._labels)

    def _counter(self, name: str, description: str, label: str) -> Counter:
        return Counter(f"baklava:{name}", description, (*_LABELS, label), registry=self._registry)


@dataclass
class RequestMetrics:
    """Measure one HTTP request, whose engine requests are submitted through this object.

    `admitted` and `first_token` are seconds since `arrived`: when the engine admitted its first prompt, and when its
    first token came. `plan_digest` names the plan of that prompt.
    """

    metrics: Metrics
    engine: EngineClient
    arrived: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first_token: float | None = None
    plan_digest: str = ""
    _last_token: dict[int, float] = field(default_factory=dict)
    _counted_as_rejected: bool = False

    def submit(self, *requests: tuple[EngineRequest, OutputCallback]) -> Sequence[RequestHandle]:
        """Submit to the engine, and observe the admission."""
        return self.engine.submit(*((request, partial(self._observe, callback)) for request, callback in requests))

    def _observe(self, callback: OutputCallback, output: EngineOutput) -> None:
        if isinstance(output, PrefillDone) and self.admitted is None:
            self.admitted, self.plan_digest = output.admitted_at - self.arrived, output.plan_digest
        callback(output)

    def to_api_error(self, error: Exception) -> ApiError:
        """Convert an exception for the client, and count a rejection if there was no token yet."""
        api_error = to_api_error(error)
        if self.first_token is None and not self._counted_as_rejected:
            self._counted_as_rejected = True
            self.metrics.count_rejected(api_error.status)
        return api_error

    async def track(
        self, deltas: AsyncGenerator[TextDelta], usage: Usage, log_fields: dict[str, Any]
    ) -> AsyncGenerator[TextDelta]:
        """Yield the same deltas, and write the measurements to the metrics and to the access log; raises ApiError."""
        reason = "abort"
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    self._on_delta(delta)
                    yield delta
            reason = "stop"
        except Exception as error:
            reason = "error"
            raise self.to_api_error(error) from None
        finally:
            self._on_end(reason, usage, log_fields)

    def _on_delta(self, delta: TextDelta) -> None:
        now = time.monotonic()
        if self.first_token is None:
            self.first_token = now - self.arrived
            self.metrics.time_to_first_token.observe(self.first_token)
        if delta.index in self._last_token:
            self.metrics.inter_token_latency.observe(now - self._last_token[delta.index])
        self._last_token[delta.index] = now
        if delta.finish_reason:
            self.metrics.count_finished(delta.finish_reason)

    def _on_end(self, reason: str, usage: Usage, log_fields: dict[str, Any]) -> None:
        if reason == "abort" or (reason == "error" and self.first_token is not None):
            self.metrics.count_finished(reason)
        if self.first_token is not None:
            admitted, last_token = self.admitted or 0.0, max(self._last_token.values()) - self.arrived
            self.metrics.e2e_latency.observe(time.monotonic() - self.arrived)
            self.metrics.prompt_tokens.observe(usage.prompt_tokens)
            self.metrics.generation_tokens.observe(usage.completion_tokens)
            self.metrics.queue_time.observe(admitted)
            self.metrics.prefill_time.observe(self.first_token - admitted)
            self.metrics.decode_time.observe(last_token - self.first_token)
            self.metrics.inference_time.observe(last_token - admitted)
            log_fields["first_token_seconds"] = round(self.first_token, 4)
        log_fields |= {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "generation": reason,
        }


class _EngineCollector(Collector):
    """The engine's own numbers at the time of a scrape."""

    def __init__(
        self, labels: tuple[str, str], state: Callable[[], EngineState], plan: Callable[[], BudgetPlan]
    ) -> None:
        self._labels, self._state, self._plan = labels, state, plan

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, as Prometheus's client requires."""
        state, plan = self._state(), self._plan()
        for name, description, value in _gauges(state, plan):
            gauge = GaugeMetricFamily(f"baklava:{name}", description, labels=_LABELS)
            gauge.add_metric(list(self._labels), value)
            yield gauge
        for name, description, value in _counters(state):
            counter = CounterMetricFamily(f"baklava:{name}", description, labels=_LABELS)
            counter.add_metric(list(self._labels), value)
            yield counter
        plan_info = {
            "plan": plan.digest,
            "eviction": plan.eviction.method,
            "prefill": plan.prefill.mode,
            "ratio": f"{plan.ratio:.4f}",
        }
        yield self._info("plan_info", "The active plan.", plan_info)
        cache_config = {
            "block_size": plan.context_length,
            "num_gpu_blocks": state.pool_bytes // plan.bytes_per_sequence,
        }
        yield self._info("cache_config_info", "The pool, in blocks of one sequence of the plan's length.", cache_config)

    def _info(self, name: str, description: str, values: dict[str, Any]) -> Metric:
        family = GaugeMetricFamily(f"baklava:{name}", description, labels=(*_LABELS, *values))
        family.add_metric([*self._labels, *map(str, values.values())], 1)
        return family

    def describe(self) -> Iterable[Metric]:
        """Return no names: Prometheus's client would call `collect` for them before there is an engine."""
        return ()


def _gauges(state: EngineState, plan: BudgetPlan) -> list[tuple[str, str, float]]:
    usage = state.reserved_bytes / state.pool_bytes if state.pool_bytes else 0.0
    return [
        ("num_requests_running", "Sequences that are running.", state.running),
        ("num_requests_waiting", "Requests that wait for admission.", state.waiting),
        ("kv_cache_usage_perc", "Share of the pool that is reserved, 0 to 1.", usage),
        ("kv_pool_bytes", "Size of the pool of KV caches.", state.pool_bytes),
        ("kv_reserved_bytes", "Bytes reserved for running sequences and pinned prefixes.", state.reserved_bytes),
        ("kv_allocated_bytes", "Bytes that KV caches have allocated.", state.allocated_bytes),
        ("kv_peak_bytes", "Most bytes allocated so far, at any moment of any step.", state.peak_bytes),
        ("kv_prefix_cache_bytes", "Bytes that pinned prefixes have allocated.", state.prefix_cache_bytes),
        ("kv_cached_prompt_bytes", "Bytes of the caches of earlier prompts.", state.cached_prompt_bytes),
        ("kv_full_entries", "KV entries that running sequences would have without eviction.", state.full_entries),
        ("kv_cached_entries", "KV entries of running sequences, over all layers and heads.", state.cached_entries),
        ("draining", "1 while the replica rejects new requests because it shuts down.", state.draining),
        ("engine_alive", "1 while the engine's thread runs.", state.alive),
        ("kv_plan_bytes_per_seq", "Maximum bytes of a sequence under the plan.", plan.bytes_per_sequence),
        ("kv_full_bytes_per_seq", "Bytes of a full 16-bit cache at the plan's length.", plan.full_bytes_per_sequence),
    ]


def _counters(state: EngineState) -> list[tuple[str, str, float]]:
    counts = state.counts
    return [
        ("prompt_tokens", "Prefilled prompt tokens, including those from the prefix cache.", counts.prompt_tokens),
        ("generation_tokens", "Generated tokens.", counts.generation_tokens),
        ("prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache.", counts.prompt_tokens),
        ("prefix_cache_hits", "Prompt tokens that came from the prefix cache.", counts.cached_tokens),
        ("num_preemptions", "Preempted sequences: always 0, because admission reserves all bytes.", 0),
        ("requests_finished", "Requests that finished normally.", counts.finished),
        ("requests_failed", "Requests that ended with an error.", counts.failed),
        ("requests_cancelled", "Requests whose client disconnected.", counts.cancelled),
        ("engine_steps", "Steps of the engine.", counts.steps),
    ]


def merge_metrics(texts: Iterable[str]) -> str:
    """Merge the metrics of several replicas into one text that describes each name once."""
    descriptions: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        name = ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
            if line.startswith("# "):
                lines = descriptions.setdefault(name, [])
                if line not in lines:
                    lines.append(line)
            else:
                samples.setdefault(name, []).append(line)
    return "".join(f"{line}\n" for name, lines in descriptions.items() for line in (*lines, *samples.get(name, ())))
