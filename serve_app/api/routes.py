"""/tokenize, /detokenize and /tokenizer_info: what clients ask that count or score tokens themselves."""

from collections.abc import Iterable
from typing import Annotated, Any, Self

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import Field, model_validator

from baklava import __version__
from serve_app.api.access_log import Journal
from serve_app.api.handlers import Replica
from serve_app.api.metrics import CONTENT_TYPE, merged
from serve_app.api.middleware import BodyGuard, HostGuard, KeyGuard, is_among, presented_key
from serve_app.api.network import NO_KEYS, Keys
from serve_app.api.status_page import PAGE_HEADERS, page
from serve_app.openai import errors
from serve_app.openai.errors import ApiError
from serve_app.openai.protocol import ChatRequest, CompletionRequest, Message
from serve_app.openai.request_base import CHAT_ONLY, NEUTRAL, TOKENIZE_ONLY, Ids, RequestBody, Text, refuse
from serve_app.openai.responses import CHAT, COMPLETION
from serve_app.openai.tokenization import Prompts
from serve_app.replication.plan_registry import REGISTRY, resolve
from serve_app.replication.plan_rollout import PlanRequest, settled


class TokenizeRequest(RequestBody):
    """A text, or the messages of a chat, up to the answer that they ask for."""

    refused = NEUTRAL | TOKENIZE_ONLY

    prompt: Text | None = None
    messages: Annotated[tuple[Message, ...], Field(min_length=1)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_no_chat_has(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("messages") is not None:
            refuse(data, CHAT_ONLY)
        return data

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(RequestBody):
    """Token ids."""

    tokens: Ids


def tokenized(prompts: Prompts, request: TokenizeRequest) -> dict[str, Any]:
    """The tokens and their number, beside the most that the model takes; raises ApiError."""
    if request.messages is not None:
        ids = prompts.chat(request.messages, {})
    else:
        ids = prompts.text(request.prompt or "", special=request.add_special_tokens)
    return {"tokens": ids, "count": len(ids), "max_model_len": prompts.limit}


def information(tokenizer: Any) -> dict[str, Any]:
    """Special tokens and the chat template."""
    special = {name: getattr(tokenizer, name, None) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return {**special, "chat_template": tokenizer.chat_template, "tokenizer_class": type(tokenizer).__name__}


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
