"""One replica: a model inside its plan, and how it answers requests."""

from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from serve_app.api.access_log import notes
from serve_app.api.metrics import Metrics, Watch
from serve_app.engine.engine import Engine
from serve_app.engine.types import DrainingError, EngineState, EngineRequest
from serve_app.openai.errors import ApiError
from serve_app.openai.output_processor import OutputProcessor
from serve_app.openai.protocol import ChatRequest, CompletionRequest
from serve_app.openai.responses import STREAM_HEADERS, Names, Reply, Style, begun
from serve_app.openai.tokenization import Prompt, Prompts
from serve_app.replication.coordinator import Follower

REQUEST_SECONDS = 600.0
"""Longest life of a request, its wait included; a whole context of a small model on a CPU fits."""

CACHE_HEADER = "x-baklava-plan"
"""Header of every generated answer: the plan whose budgets all of its tokens and log-probabilities went through."""


@dataclass(frozen=True)
class Replica:
    """What the routes need: an engine, its tokenizer, its metrics, the other replicas, and when it came up.

    `seconds` is the longest life of a request, its wait included.
    """

    engine: Engine
    prompts: Prompts
    metrics: Metrics
    follower: Follower
    model: str
    created: int
    seconds: float = REQUEST_SECONDS

    async def generate(self, body: ChatRequest | CompletionRequest, style: Style, request: Request) -> Response:
        """Answer a request at once or as a stream; raises ApiError only.

        When this returns, a stream has its first token, unless whoever stands between would hang up before.
        """
        watch = Watch(self.metrics, self.engine)
        try:
            return await self._answer(body, style, request, watch)
        except Exception as error:
            raise watch.refusal(error) from None

    async def _answer(
        self, body: ChatRequest | CompletionRequest, style: Style, request: Request, watch: Watch
    ) -> Response:
        self.check_model(body.model)
        prompts = await run_in_threadpool(self.prompts.encode, body)
        answering = self._answering(body, prompts, watch.began + self.seconds)
        names = None if body.alternatives is None else Names(self.prompts.tokenizer, body.return_tokens_as_token_ids)

        def plan() -> str:  # another one may be put in force while the request waits
            return watch.plan or self.engine.plan.digest

        reply = Reply(style, self.model, lambda: f"baklava-{plan()}", answering.usage, names)
        pieces = watch.over(answering.deltas(watch), answering.usage, notes(request.scope))
        if not body.stream:
            async with aclosing(pieces):
                return JSONResponse(await reply.whole(pieces), headers={CACHE_HEADER: plan()})
        events = reply.events(await begun(pieces), body.stream_options)
        headers = STREAM_HEADERS | {CACHE_HEADER: plan()}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    def _answering(self, body: ChatRequest | CompletionRequest, prompts: list[Prompt], deadline: float) -> OutputProcessor:
        echo = isinstance(body, CompletionRequest) and body.echo
        works = [
            EngineRequest(
                prompt=prompt.ids,
                sampling_params=body.sampling(prompt.max_tokens),
                n=body.n,
                logprobs=body.alternatives,
                prompt_logprobs=body.alternatives if echo else None,
                deadline=deadline,
            )
            for prompt in prompts
        ]
        return OutputProcessor(self.prompts.tokenizer, prompts, works, body.stop, echo)

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 for any model but the one that is served."""
        if name not in (None, self.model):
            raise ApiError(
                f"The model `{name}` does not exist; this server has `{self.model}`.",
                404,
                param="model",
                code="model_not_found",
            )

    def check_ready(self) -> EngineState:
        """Raise DrainingError, or ApiError 503, unless new requests are taken."""
        state = self.check_alive()
        if state.draining:
            raise DrainingError
        return state

    def check_alive(self) -> EngineState:
        """Raise ApiError 503 unless the engine runs."""
        state = self.engine.state()
        if not state.alive:
            raise ApiError("The engine has died; the server is about to start anew.", 503, code="dead", retry_after=10)
        return state

    @property
    def card(self) -> dict[str, Any]:
        """The served model as /v1/models lists it; the context was validated up to the length of the plan."""
        return {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "baklava",
            "root": self.model,
            "parent": None,
            "max_model_len": self.prompts.limit,
            "validated_context": min(self.engine.plan.context_length, self.prompts.limit),
            "plan": self.engine.plan.digest,
        }

    @property
    def plan(self) -> dict[str, Any]:
        """What the plan in force promises."""
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
