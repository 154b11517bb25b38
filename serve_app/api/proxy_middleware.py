"""What stands in Ray Serve's HTTP proxy, in front of all replicas: so that what Serve itself answers can be read too.

Serve finds it by the name in `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` of the cluster's environment.
"""

import json
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.access_log import HEADER, request_id
from serve_app.openai.errors import ApiError

PATH = "serve_app.api.proxy_middleware:middlewares"
VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"

# A client could keep its request alive with these after it has gone, or longer than others.
_NOT_FOR_CLIENTS = ("x-request-disconnect-disabled", "x-request-timeout-seconds")

_LOST = "The replica that worked on this request was lost; try again."
_ABSENT = "The server is starting or ending; try again."
_BUSY = "The server is busy; try again later."


def middlewares() -> list[Middleware]:
    """What Serve calls for."""
    return [Middleware(Front)]


@dataclass(frozen=True)
class Front:
    """Gives Serve's own errors the shape of all others, and an answer that broke off an end that says so."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI protocol."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"].startswith("/-/"):  # Serve's own pages, which know no API key
            await ApiError("There is nothing here.", 404).response(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        for name in _NOT_FOR_CLIENTS:
            if name in headers:
                del headers[name]
        headers[HEADER] = request_id(headers)
        answer = _Answer(send)
        await self.app(scope, receive, answer.send)
        await answer.end(scope, receive)


@dataclass
class _Answer:
    """Passes an answer on and remembers how far it came."""

    onward: Send
    refused: int = 0
    began: bool = False
    streams: bool = False
    ended: bool = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message["headers"]))
            if HEADER in headers:  # the replica has named it, and Serve once more
                headers[HEADER] = headers[HEADER]
            message = {**message, "headers": headers.raw}
            kind = headers.get("content-type", "")
            if message["status"] >= 400 and not kind.startswith("application/json"):
                self.refused = message["status"]
                return
            self.began, self.streams = True, kind.startswith("text/event-stream")
        if self.refused:
            return
        self.ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self.onward(message)

    async def end(self, scope: Scope, receive: Receive) -> None:
        """Say what the server behind did not say any more."""
        if self.ended:
            return
        if not self.began:
            await _explain(self.refused).response(scope, receive, self.onward)
        elif self.streams:
            body = f"data: {json.dumps(ApiError(_LOST, 503).body)}\n\ndata: [DONE]\n\n"
            await self.onward({"type": "http.response.body", "body": body.encode(), "more_body": False})


def _explain(status: int) -> ApiError:
    """What an answer of Serve's own means: it has no text that a client could do anything with."""
    match status:
        case 408:
            return ApiError("The request's time was up.", 408, code="deadline")
        case 429:
            return ApiError(_BUSY, 429, code="queue_full", retry_after=5)
        case 404 | 503:
            return ApiError(_ABSENT, 503, code="unavailable", retry_after=5)
    return ApiError(_LOST, 503, code="replica_lost", retry_after=1)
