"""The HTTP application: routes and their handlers on one replica, with middleware around them."""

from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from baklava import __version__
from baklava.plan.registry import REGISTRY_SCHEME, load_plan
from serve_app.api.metrics import CONTENT_TYPE, Metrics, RequestMetrics, merge_metrics
from serve_app.api.middleware import (
    AccessLogMiddleware,
    ApiKeyMiddleware,
    BodyLimitMiddleware,
    HostCheckMiddleware,
    MonitorRequestMiddleware,
    extract_api_key,
    matches_any,
    request_log,
)
from serve_app.api.network import NO_KEYS, ApiKeys, key_digest
from serve_app.api.status_page import PAGE_HEADERS, render_page
from serve_app.engine.engine import Engine
from serve_app.engine.types import DrainingError, EngineRequest, EngineState
from serve_app.openai.errors import ApiError, install_error_handlers
from serve_app.openai.output_processor import OutputProcessor
from serve_app.openai.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from serve_app.openai.responses import (
    CHAT,
    COMPLETION,
    STREAM_HEADERS,
    ResponseBuilder,
    ResponseFormat,
    TokenNamer,
    await_first_delta,
)
from serve_app.openai.tokenization import PromptEncoder
from serve_app.replication.replica_sync import PlanRequest, ReplicaSync

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
                cache_salt=key_digest(extract_api_key(request.scope) or "") + (body.cache_salt or ""),
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


MAX_BODY_BYTES = 2 * 2**20
"""Maximum size of a request body: several times a context of 100,000 tokens."""


def create_app(handlers: RequestHandlers, keys: ApiKeys = NO_KEYS, host: str = "localhost") -> FastAPI:
    """Return the application.

    With keys, all routes but /health require one. Without keys, only requests to this machine or to `host` pass.
    """
    app = FastAPI(title="baklava", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimitMiddleware, limit=MAX_BODY_BYTES)
    if not keys.required:
        app.add_middleware(HostCheckMiddleware, name=host)
    app.add_middleware(ApiKeyMiddleware, digests=keys.all)
    app.add_middleware(MonitorRequestMiddleware)
    app.add_middleware(AccessLogMiddleware)
    install_error_handlers(app)
    _add_openai_routes(app, handlers)
    _add_monitoring_routes(app, handlers)
    _add_plan_routes(app, handlers, keys)
    return app


def _add_openai_routes(app: FastAPI, handlers: RequestHandlers) -> None:
    @app.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await handlers.generate(body, COMPLETION, request)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await handlers.generate(body, CHAT, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [handlers.model_card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        handlers.check_model(name)
        return handlers.model_card

    @app.post("/tokenize")
    def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        return handlers.tokenize(body)

    @app.post("/detokenize")
    def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        handlers.check_model(body.model)
        return {"prompt": handlers.encoder.decode(body.tokens)}

    @app.get("/tokenizer_info")
    def tokenizer_info() -> dict[str, Any]:
        return handlers.tokenizer_info


def _add_monitoring_routes(app: FastAPI, handlers: RequestHandlers) -> None:
    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/health")
    async def health() -> dict[str, str]:
        handlers.check_alive()
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        state = handlers.check_ready()
        return {"status": "ready", "running": state.running, "waiting": state.waiting}

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        texts = [report.metrics for report in handlers.replica_sync.all_reports()]
        return PlainTextResponse(merge_metrics(texts), media_type=CONTENT_TYPE)

    @app.get("/")
    def status_page() -> HTMLResponse:
        page = render_page(handlers.model_card, handlers.engine.plan, handlers.replica_sync.all_reports())
        return HTMLResponse(page, headers=PAGE_HEADERS)


def _add_plan_routes(app: FastAPI, handlers: RequestHandlers, keys: ApiKeys) -> None:
    @app.get("/v1/plan")
    def plan() -> dict[str, Any]:
        states = {report.replica: report.state for report in handlers.replica_sync.all_reports()}
        return handlers.plan_info | {"replicas": states}

    @app.post("/v1/plan")
    async def change_plan(body: PlanRequest, request: Request) -> JSONResponse:
        # Without keys the server listens on loopback only, and HostCheckMiddleware rejects other hosts.
        if keys.required and not matches_any(extract_api_key(request.scope) or "", keys.admin):
            message = "This key may not change the plan; use one of BAKLAVA_ADMIN_KEYS or --admin-keys."
            raise ApiError(message, 403, code="not_an_admin_key")
        plan = await run_in_threadpool(body.load, load_plan, REGISTRY_SCHEME)
        reports = await run_in_threadpool(handlers.replica_sync.publish, plan)
        replicas = {
            report.replica: {"plan": report.state["plan"]} | ({"failed": report.failure} if report.failure else {})
            for report in reports
        }
        return JSONResponse({"digest": plan.digest, "ratio": plan.ratio, "replicas": replicas})
