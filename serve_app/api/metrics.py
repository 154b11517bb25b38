"""What Prometheus reads: vLLM's names after a prefix of our own, so that its dashboards need one replacement.

Every metric has the labels `model_name` and `replica`.
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
from serve_app.engine.types import OutputCallback, EngineOutput, RequestHandle, PrefillDone, EngineState, EngineRequest
from serve_app.openai.detokenizer import TextDelta
from serve_app.openai.errors import ApiError, as_api_error
from serve_app.openai.output_processor import EngineClient, Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LABELS = ("model_name", "replica")

# vLLM's buckets, so that the same panels fit
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """The metrics of one replica; `state` and `plan` are asked at every look."""

    def __init__(self, model: str, replica: str, state: Callable[[], EngineState], plan: Callable[[], BudgetPlan]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine((model, replica), state, plan))
        self._labels = (model, replica)
        self.first = self._histogram("time_to_first_token_seconds", "From a request to its first token.", _FIRST)
        self.between = self._histogram("inter_token_latency_seconds", "Between tokens of a continuation.", _BETWEEN)
        self.whole = self._histogram("e2e_request_latency_seconds", "From a request to its end.", _WHOLE)
        self.queue = self._histogram("request_queue_time_seconds", "From a request to its admission.", _WHOLE)
        self.prefill = self._histogram("request_prefill_time_seconds", "From admission to the first token.", _WHOLE)
        self.decode = self._histogram("request_decode_time_seconds", "From the first token to the last.", _WHOLE)
        self.inference = self._histogram("request_inference_time_seconds", "From admission to the last token.", _WHOLE)
        self.asked = self._histogram("request_prompt_tokens", "Tokens of a request's prompts.", _TOKENS)
        self.made = self._histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)
        self._ends = self._counter("request_success", "Ended continuations.", "finished_reason")
        self._refused = self._counter("admission_rejections", "Requests that were not begun.", "status")

    @property
    def text(self) -> str:
        """All of them in Prometheus's format."""
        return generate_latest(self._registry).decode()

    def ended(self, reason: str) -> None:
        """A continuation ended: stop, length, abort (the client went away) or error."""
        self._ends.labels(*self._labels, reason).inc()

    def refused(self, status: int) -> None:
        """A request was answered with this status before it was begun."""
        self._refused.labels(*self._labels, str(status)).inc()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Any:
        made = Histogram(f"baklava:{name}", text, _LABELS, registry=self._registry, buckets=buckets)
        return made.labels(*self._labels)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"baklava:{name}", text, (*_LABELS, label), registry=self._registry)


@dataclass
class Watch:
    """Follows one request, whose engine is asked through it, and writes down how it went when it has ended.

    `admitted` and `first` are the seconds until the engine let its first prompt in, and until its first token; `plan`
    is the digest of the plan that it then lived inside.
    """

    metrics: Metrics
    engine: EngineClient
    began: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first: float | None = None
    plan: str = ""
    _last: dict[int, float] = field(default_factory=dict)
    _refused: bool = False

    def submit(self, *asked: tuple[EngineRequest, OutputCallback]) -> Sequence[RequestHandle]:
        """As the engine does."""
        return self.engine.submit(*((work, partial(self._note, deliver)) for work, deliver in asked))

    def _note(self, deliver: OutputCallback, event: EngineOutput) -> None:
        if isinstance(event, PrefillDone) and self.admitted is None:
            self.admitted, self.plan = event.admitted_at - self.began, event.plan_digest
        deliver(event)

    def refusal(self, error: Exception) -> ApiError:
        """What to tell the client about an exception, which counts as a refusal while nothing was delivered."""
        told = as_api_error(error)
        if self.first is None and not self._refused:
            self._refused = True
            self.metrics.refused(told.status)
        return told

    async def over(self, pieces: AsyncGenerator[TextDelta], usage: Usage, notes: dict[str, Any]) -> AsyncGenerator[TextDelta]:
        """The same pieces. What is found goes to the metrics and to the notes of the log. Raises ApiError."""
        reason = "abort"
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    self._see(piece)
                    yield piece
            reason = "stop"
        except Exception as error:
            reason = "error"
            raise self.refusal(error) from None
        finally:
            self._end(reason, usage, notes)

    def _see(self, piece: TextDelta) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = now - self.began
            self.metrics.first.observe(self.first)
        if piece.index in self._last:
            self.metrics.between.observe(now - self._last[piece.index])
        self._last[piece.index] = now
        if piece.finish_reason:
            self.metrics.ended(piece.finish_reason)

    def _end(self, reason: str, usage: Usage, notes: dict[str, Any]) -> None:
        if reason in ("abort", "error") and (self.first is not None or reason == "abort"):
            self.metrics.ended(reason)
        if self.first is not None:
            self.metrics.whole.observe(time.monotonic() - self.began)
            self.metrics.asked.observe(usage.prompt_tokens)
            self.metrics.made.observe(usage.completion_tokens)
            self._divide(self.admitted or 0.0, self.first, max(self._last.values()) - self.began)
            notes["first_token_seconds"] = round(self.first, 4)
        notes |= {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "generation": reason,
        }

    def _divide(self, admitted: float, first: float, last: float) -> None:
        self.metrics.queue.observe(admitted)
        self.metrics.prefill.observe(first - admitted)
        self.metrics.decode.observe(last - first)
        self.metrics.inference.observe(last - admitted)


class _Engine(Collector):
    """The engine's own numbers, as they are at the time of the look."""

    def __init__(self, labels: tuple[str, str], state: Callable[[], EngineState], plan: Callable[[], BudgetPlan]) -> None:
        self._labels, self._state, self._plan = labels, state, plan

    def collect(self) -> Iterator[Metric]:
        """Prometheus's protocol."""
        state, plan = self._state(), self._plan()
        for name, text, value in (*_gauges(state), *_of_plan(plan)):
            yield self._one(GaugeMetricFamily(f"baklava:{name}", text, labels=_LABELS), value)
        for name, text, value in _counts(state):
            yield self._one(CounterMetricFamily(f"baklava:{name}", text, labels=_LABELS), value)
        told = {"eviction": plan.eviction.method, "prefill": plan.prefill.mode, "ratio": f"{plan.ratio:.4f}"}
        yield self._info("plan_info", "The plan in force.", {"plan": plan.digest} | told)
        whole = {"block_size": plan.context_length, "num_gpu_blocks": state.pool_bytes // plan.bytes_per_sequence}
        yield self._info("cache_config_info", "The pool; a block is a sequence of the plan's length.", whole)

    def _info(self, name: str, text: str, told: dict[str, Any]) -> Metric:
        family = GaugeMetricFamily(f"baklava:{name}", text, labels=(*_LABELS, *told))
        family.add_metric([*self._labels, *map(str, told.values())], 1)
        return family

    def _one(self, family: Any, value: float) -> Metric:
        family.add_metric(list(self._labels), value)
        return family

    def describe(self) -> Iterable[Metric]:
        """Prometheus's protocol: the names are not known before the engine is."""
        return ()


_Numbers = list[tuple[str, str, float]]


def _gauges(state: EngineState) -> _Numbers:
    return [
        ("num_requests_running", "Sequences that are in the pool.", state.running),
        ("num_requests_waiting", "Requests that wait for room in the pool.", state.waiting),
        ("kv_cache_usage_perc", "Share of the pool that is promised, 0 to 1.", share(state)),
        ("kv_pool_bytes", "Bytes for KV caches.", state.pool_bytes),
        ("kv_promised_bytes", "Bytes that are reserved for sequences and declared prompts.", state.reserved_bytes),
        ("kv_held_bytes", "Bytes that KV caches were measured to hold.", state.allocated_bytes),
        ("kv_held_bytes_max", "Most bytes that KV caches ever held.", state.peak_bytes),
        ("kv_snapshot_bytes", "Bytes of declared prompts.", state.snapshot_bytes),
        ("kv_tokens_seen", "Entries of running sequences had nothing been evicted.", state.seen),
        ("kv_tokens_kept", "Entries of running sequences over all (layer, KV head).", state.kept),
        ("draining", "1 while the replica takes no more requests.", state.draining),
        ("engine_alive", "1 while the engine's thread runs.", state.alive),
    ]


def _of_plan(plan: BudgetPlan) -> _Numbers:
    return [
        ("kv_plan_bytes_per_seq", "Most bytes of a sequence inside the plan.", plan.bytes_per_sequence),
        ("kv_full_bytes_per_seq", "Bytes of the full 16-bit cache at the plan's length.", plan.full_bytes_per_sequence),
    ]


def _counts(state: EngineState) -> _Numbers:
    counts = state.counts
    return [
        ("prompt_tokens", "Prompt tokens that entered.", counts.prompt_tokens),
        ("generation_tokens", "Tokens that were generated.", counts.generation_tokens),
        ("prefix_cache_queries", "Prompt tokens that declared prompts were looked up for.", counts.prompt_tokens),
        ("prefix_cache_hits", "Prompt tokens that came from declared prompts.", counts.cached_tokens),
        ("num_preemptions", "Sequences that lost their place: none, by admission.", 0),
        ("requests_finished", "Requests that ended as they should.", counts.finished),
        ("requests_failed", "Requests that an error ended.", counts.failed),
        ("requests_cancelled", "Requests whose client went away.", counts.cancelled),
        ("engine_steps", "Steps of the engine.", counts.steps),
    ]


def share(state: EngineState) -> float:
    """Share of the pool that is promised."""
    return state.reserved_bytes / state.pool_bytes if state.pool_bytes else 0.0


def merged(texts: Iterable[str]) -> str:
    """The metrics of several replicas as one text, in which every name is described once."""
    described: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        name = ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
            if line.startswith("# "):
                lines = described.setdefault(name, [])
                if line not in lines:
                    lines.append(line)
            else:
                samples.setdefault(name, []).append(line)
    return "".join(f"{line}\n" for name in described for line in (*described[name], *samples.get(name, ())))
