"""The HTTP routes of one replica, as a FastAPI app that knows nothing of Ray."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from serve_app import errors
from serve_app.engine import Engine
from serve_app.errors import ApiError, as_api_error
from serve_app.guards import BodyGuard, KeyGuard
from serve_app.prompts import Prompts
from serve_app.replies import CHAT, COMPLETION, STREAM_HEADERS, Reply, Style
from serve_app.schema import ChatRequest, CompletionRequest
from serve_app.text import Piece, pieces
from serve_app.turns import Turns

BODY_LIMIT = 2 * 2**20
"""Most bytes of a request body; a context of 100,000 tokens fits several times over."""


@dataclass(frozen=True)
class Replica:
    """What the routes need: a model inside its plan, its tokenizer, the line in front of it, and when it came up."""

    engine: Engine
    prompts: Prompts
    turns: Turns
    model: str
    created: int

    async def generate(self, request: ChatRequest | CompletionRequest, style: Style) -> Response:
        """Answer a request at once or as a stream, whose first token exists when this returns; raises ApiError only."""
        try:
            return await self._answer(request, style)
        except Exception as error:
            raise as_api_error(error) from None

    async def _answer(self, request: ChatRequest | CompletionRequest, style: Style) -> Response:
        self.check_model(request.model)
        prompt, max_tokens = await run_in_threadpool(self.prompts.encode, request)
        reply = Reply(style, self.model, f"baklava-{self.engine.plan.digest}", len(prompt))
        sampling = request.sampling(max_tokens)
        made = self.turns.stream(lambda: pieces(self.engine, self.prompts.tokenizer, prompt, sampling, request.stop))
        if not request.stream:
            return JSONResponse(await reply.whole(made))
        events = reply.events(_resume(await anext(made), made), request.stream_options)
        return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 for any model but the one that is served."""
        if name not in (None, self.model):
            raise ApiError(
                f"The model `{name}` does not exist; this server has `{self.model}`.",
                404,
                param="model",
                code="model_not_found",
            )

    @property
    def card(self) -> dict[str, Any]:
        """The served model as /v1/models lists it."""
        return {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "baklava",
            "root": self.model,
            "parent": None,
            "max_model_len": self.prompts.limit,
        }

    @property
    def plan(self) -> dict[str, Any]:
        """What the plan promises and what this replica's caches were measured to hold."""
        plan = self.engine.plan
        return {
            "digest": plan.digest,
            "bytes_per_sequence": plan.bytes_per_sequence,
            "full_bytes_per_sequence": plan.full_bytes_per_sequence,
            "ratio": plan.ratio,
            "context_length": plan.context_length,
            "eviction": plan.eviction.model_dump(),
            "held_bytes": {"last": self.engine.held_last, "max": self.engine.held_most},
        }


def create_app(replica: Replica, key_digests: frozenset[str] = frozenset()) -> FastAPI:
    """The endpoint over one replica; with key digests, every route but /health asks for a key."""
    app = FastAPI(title="baklava", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyGuard, limit=BODY_LIMIT)
    app.add_middleware(KeyGuard, digests=key_digests)
    errors.install(app)
    _add_reading_routes(app, replica)

    @app.post("/v1/completions", response_model=None)
    async def complete(request: CompletionRequest) -> Response:
        return await replica.generate(request, COMPLETION)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: ChatRequest) -> Response:
        return await replica.generate(request, CHAT)

    return app


def _add_reading_routes(app: FastAPI, replica: Replica) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [replica.card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        replica.check_model(name)
        return replica.card

    @app.get("/v1/plan")
    async def plan() -> dict[str, Any]:
        return replica.plan


async def _resume(first: Piece, rest: AsyncGenerator[Piece]) -> AsyncGenerator[Piece]:
    yield first
    async for piece in rest:
        yield piece
