"""The HTTP application: routes over the handlers of one replica, with middleware around them."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from baklava import __version__
from baklava.plan.registry import REGISTRY_SCHEME, load_plan
from serve_app.api.handlers import RequestHandlers
from serve_app.api.metrics import CONTENT_TYPE, merge_metrics
from serve_app.api.middleware import (
    AccessLogMiddleware,
    ApiKeyMiddleware,
    BodyLimitMiddleware,
    HostCheckMiddleware,
    MonitorRequestMiddleware,
    extract_api_key,
    matches_any,
)
from serve_app.api.network import NO_KEYS, ApiKeys
from serve_app.api.status_page import PAGE_HEADERS, render_page
from serve_app.openai.errors import ApiError, install_error_handlers
from serve_app.openai.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from serve_app.openai.responses import CHAT, COMPLETION
from serve_app.replication.plan_rollout import PlanRequest

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
