"""The HTTP routes of one replica, as a FastAPI app that knows nothing of Ray."""

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from baklava import __version__
from serve_app import errors
from serve_app.errors import ApiError
from serve_app.guards import BodyGuard, HostGuard, KeyGuard, is_among, presented_key
from serve_app.journal import Journal
from serve_app.listen import NO_KEYS, Keys
from serve_app.metrics import CONTENT_TYPE, merged
from serve_app.page import PAGE_HEADERS, page
from serve_app.plans import REGISTRY, resolve
from serve_app.replica import Replica
from serve_app.replies import CHAT, COMPLETION
from serve_app.schema import ChatRequest, CompletionRequest
from serve_app.swapping import PlanRequest, settled
from serve_app.tokens import DetokenizeRequest, TokenizeRequest, information, tokenized

BODY_LIMIT = 2 * 2**20
"""Most bytes of a request body; a context of 100,000 tokens fits several times over."""


def create_app(replica: Replica, keys: Keys = NO_KEYS, host: str = "localhost") -> FastAPI:
    """The endpoint over one replica: with keys, all routes but /health ask for one; without, it answers as `host`."""
    app = FastAPI(title="baklava", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyGuard, limit=BODY_LIMIT)
    if not keys.any:
        app.add_middleware(HostGuard, name=host)
    app.add_middleware(KeyGuard, digests=keys.all)
    app.add_middleware(Journal)
    errors.install(app)
    _add_generating_routes(app, replica)
    _add_token_routes(app, replica)
    _add_model_routes(app, replica)
    _add_watching_routes(app, replica)
    _add_plan_routes(app, replica, keys)
    return app


def _add_generating_routes(app: FastAPI, replica: Replica) -> None:
    @app.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await replica.generate(body, COMPLETION, request)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await replica.generate(body, CHAT, request)


def _add_token_routes(app: FastAPI, replica: Replica) -> None:
    @app.post("/tokenize")
    def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        replica.check_model(body.model)
        return tokenized(replica.prompts, body)

    @app.post("/detokenize")
    def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        replica.check_model(body.model)
        return {"prompt": replica.prompts.decode(body.tokens)}

    @app.get("/tokenizer_info")
    def tokenizer_info() -> dict[str, Any]:
        return information(replica.prompts.tokenizer)


def _add_model_routes(app: FastAPI, replica: Replica) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [replica.card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        replica.check_model(name)
        return replica.card

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}


def _add_watching_routes(app: FastAPI, replica: Replica) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        replica.check_alive()
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        state = replica.check_ready()
        return {"status": "ready", "running": state.running, "waiting": state.waiting}

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        texts = [report.metrics for report in replica.follower.everyone()]
        return PlainTextResponse(merged(texts), media_type=CONTENT_TYPE)

    @app.get("/")
    def status() -> HTMLResponse:
        return HTMLResponse(page(replica.card, replica.engine.plan, replica.follower.everyone()), headers=PAGE_HEADERS)


def _add_plan_routes(app: FastAPI, replica: Replica, keys: Keys) -> None:
    @app.get("/v1/plan")
    def plan() -> dict[str, Any]:
        return replica.plan | {"replicas": _states(replica)}

    @app.post("/v1/plan")
    async def swap(body: PlanRequest, request: Request) -> JSONResponse:
        _check_may_swap(request, keys)
        plan = await run_in_threadpool(body.resolved, resolve, REGISTRY)
        version = await run_in_threadpool(replica.follower.propose, plan)
        reports = await run_in_threadpool(settled, replica.follower.everyone, version)
        return JSONResponse({"digest": plan.digest, "ratio": plan.ratio, "replicas": _told(reports)})


def _check_may_swap(request: Request, keys: Keys) -> None:
    # Without any key the server listens on loopback only, and HostGuard has seen to the rest.
    if keys.any and not is_among(presented_key(request.scope) or "", keys.admin):
        message = "This key may not change the plan; use one of BAKLAVA_ADMIN_KEYS or --admin-keys."
        raise ApiError(message, 403, code="not_an_admin_key")


def _states(replica: Replica) -> dict[str, dict[str, Any]]:
    return {report.replica: report.state for report in replica.follower.everyone()}


def _told(reports: Iterable[Any]) -> dict[str, dict[str, str]]:
    told = {one.replica: {"plan": one.state["plan"], "failed": one.failed} for one in reports}
    return {name: {key: text for key, text in one.items() if text} for name, one in told.items()}
