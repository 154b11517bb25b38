"""The handlers of the routes of one replica."""

from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from serve_app.api.metrics import Metrics, RequestMetrics
from serve_app.api.middleware import request_log
from serve_app.engine.engine import Engine
from serve_app.engine.types import DrainingError, EngineRequest, EngineState
from serve_app.openai.errors import ApiError
from serve_app.openai.output_processor import OutputProcessor
from serve_app.openai.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from serve_app.openai.responses import STREAM_HEADERS, ResponseBuilder, ResponseFormat, TokenNamer, await_first_delta
from serve_app.openai.tokenization import PromptEncoder
from serve_app.replication.replica_sync import ReplicaSync

DEFAULT_REQUEST_TIMEOUT_SECONDS = 600.0
"""Maximum time of a request, including its wait. A whole context of a small model on a CPU takes less."""

PLAN_HEADER = "x-baklava-plan"
"""Header of each generated answer: the digest of the plan that all of its tokens and log-probabilities used."""


@dataclass(frozen=True)
class RequestHandlers:
    """What the routes need: an engine, its prompt encoder, its metrics, the other replicas, and the start time.

    `timeout_seconds` limits a request, including its wait.
    """

    engine: Engine
    encoder: PromptEncoder
    metrics: Metrics
    replica_sync: ReplicaSync
    model: str
    created: int
    timeout_seconds: float = DEFAULT_REQUEST_TIMEOUT_SECONDS

    async def generate(
        self, body: ChatRequest | CompletionRequest, response_format: ResponseFormat, request: Request
    ) -> Response:
        """Answer at once or as a stream; raises ApiError only.

        A stream is returned with its first token, or after KEEPALIVE_SECONDS without one.
        """
        request_metrics = RequestMetrics(self.metrics, self.engine)
        try:
            return await self._generate(body, response_format, request, request_metrics)
        except Exception as error:
            raise request_metrics.to_api_error(error) from None

    async def _generate(
        self,
        body: ChatRequest | CompletionRequest,
        response_format: ResponseFormat,
        request: Request,
        request_metrics: RequestMetrics,
    ) -> Response:
        self.check_model(body.model)
        prompts = await run_in_threadpool(self.encoder.encode, body)
        echo = isinstance(body, CompletionRequest) and body.echo
        stop_tokens = self.encoder.find_stop_tokens(body.stop)
        engine_requests = [
            EngineRequest(
                prompt=prompt.ids,
                sampling_params=body.to_sampling_params(prompt.max_tokens, stop_tokens),
                n=body.n,
                logprobs=body.num_logprobs,
                prompt_logprobs=body.num_logprobs if echo else None,
                deadline=request_metrics.arrived + self.timeout_seconds,
            )
            for prompt in prompts
        ]
        processor = OutputProcessor(self.encoder.tokenizer, prompts, engine_requests, body.stop, echo)
        wants_logprobs = body.num_logprobs is not None
        namer = TokenNamer(self.encoder.tokenizer, body.return_tokens_as_token_ids) if wants_logprobs else None

        def plan_digest() -> str:  # the active plan may change while the request waits
            return request_metrics.plan_digest or self.engine.plan.digest

        builder = ResponseBuilder(
            response_format, self.model, lambda: f"baklava-{plan_digest()}", processor.usage, namer
        )
        deltas = request_metrics.track(processor.deltas(request_metrics), processor.usage, request_log(request.scope))
        if not body.stream:
            async with aclosing(deltas):
                return JSONResponse(await builder.complete(deltas), headers={PLAN_HEADER: plan_digest()})
        events = builder.stream(await await_first_delta(deltas), body.stream_options)
        headers = STREAM_HEADERS | {PLAN_HEADER: plan_digest()}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        """Return the tokens of a text or chat, their number, and the maximum that the model takes; raises ApiError."""
        self.check_model(body.model)
        if body.messages is not None:
            ids = self.encoder.encode_chat(body.messages, {})
        else:
            ids = self.encoder.encode_text(body.prompt or "", add_special_tokens=body.add_special_tokens)
        return {"tokens": ids, "count": len(ids), "max_model_len": self.encoder.max_model_len}

    @property
    def tokenizer_info(self) -> dict[str, Any]:
        """What clients need that score texts token by token."""
        tokenizer = self.encoder.tokenizer
        special = {
            name: getattr(tokenizer, name, None) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        return special | {"chat_template": tokenizer.chat_template, "tokenizer_class": type(tokenizer).__name__}

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 for a model that is not served."""
        if name not in (None, self.model):
            raise ApiError(
                f"The model `{name}` does not exist; this server has `{self.model}`.",
                404,
                param="model",
                code="model_not_found",
            )

    def check_ready(self) -> EngineState:
        """Return the engine's state; raises DrainingError or ApiError 503 if it accepts no requests."""
        state = self.check_alive()
        if state.draining:
            raise DrainingError
        return state

    def check_alive(self) -> EngineState:
        """Return the engine's state; raises ApiError 503 if it does not run."""
        state = self.engine.state()
        if not state.alive:
            raise ApiError("The engine has died, and the server is restarting it.", 503, code="dead", retry_after=10)
        return state

    @property
    def model_card(self) -> dict[str, Any]:
        """The served model in /v1/models. `validated_context` is the length for which the plan was made."""
        return {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "baklava",
            "root": self.model,
            "parent": None,
            "max_model_len": self.encoder.max_model_len,
            "validated_context": min(self.engine.plan.context_length, self.encoder.max_model_len),
            "plan": self.engine.plan.digest,
        }

    @property
    def plan_info(self) -> dict[str, Any]:
        """The active plan in /v1/plan."""
        plan = self.engine.plan
        return {
            "digest": plan.digest,
            "model": plan.model.id,
            "bytes_per_sequence": plan.bytes_per_sequence,
            "full_bytes_per_sequence": plan.full_bytes_per_sequence,
            "ratio": plan.ratio,
            "context_length": plan.context_length,
            "eviction": plan.eviction.model_dump(),
            "prefill": plan.prefill.model_dump(),
            "allocation": plan.allocation.model_dump(),
            "tokens": plan.tokens,
        }
