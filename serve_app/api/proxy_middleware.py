"""Middleware of Ray Serve's HTTP proxy, in front of all replicas: it puts Serve's own errors into the API's format.

Serve imports it by the path in `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` of the cluster's environment.
"""

import json
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.middleware import REQUEST_ID_HEADER, request_id
from serve_app.openai.errors import ApiError

# With these a client could keep its request running after it disconnected, or longer than others.
_SERVE_CONTROL_HEADERS = ("x-request-disconnect-disabled", "x-request-timeout-seconds")

_REPLICA_LOST = "The replica that worked on this request was lost; try again."


def middlewares() -> list[Middleware]:
    """Return the middleware for Serve's proxy."""
    return [Middleware(ProxyErrorMiddleware)]


@dataclass(frozen=True)
class ProxyErrorMiddleware:
    """Convert Ray Serve's own errors to the API's error format, and end interrupted streams with an error event."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request as ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"].startswith("/-/"):  # Serve's own pages, which check no API key
            await ApiError("There is no such route.", 404).response(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        for name in _SERVE_CONTROL_HEADERS:
            if name in headers:
                del headers[name]
        headers[REQUEST_ID_HEADER] = request_id(headers)
        response = _ProxiedResponse(send)
        await self.app(scope, receive, response.send)
        await response.finish(scope, receive)


@dataclass
class _ProxiedResponse:
    """Pass a response on to the client, and record how far it came."""

    send_to_client: Send
    serve_error_status: int = 0
    started: bool = False
    is_stream: bool = False
    ended: bool = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message["headers"]))
            if REQUEST_ID_HEADER in headers:  # set by the replica and again by Serve: keep one
                headers[REQUEST_ID_HEADER] = headers[REQUEST_ID_HEADER]
            message = {**message, "headers": headers.raw}
            content_type = headers.get("content-type", "")
            if message["status"] >= 400 and not content_type.startswith("application/json"):
                self.serve_error_status = message["status"]
                return
            self.started, self.is_stream = True, content_type.startswith("text/event-stream")
        if self.serve_error_status:
            return
        self.ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self.send_to_client(message)

    async def finish(self, scope: Scope, receive: Receive) -> None:
        """Send what the replica did not send."""
        if self.ended:
            return
        if not self.started:
            await _to_api_error(self.serve_error_status).response(scope, receive, self.send_to_client)
        elif self.is_stream:
            body = f"data: {json.dumps(ApiError(_REPLICA_LOST, 503).body)}\n\ndata: [DONE]\n\n"
            await self.send_to_client({"type": "http.response.body", "body": body.encode(), "more_body": False})


def _to_api_error(status: int) -> ApiError:
    """Translate the status of an error of Serve's own, whose text does not help a client."""
    match status:
        case 408:
            return ApiError("The request timed out.", 408, code="deadline")
        case 429:
            return ApiError("The server is busy; try again later.", 429, code="queue_full", retry_after=5)
        case 404 | 503:
            message = "The server is starting or shutting down; try again."
            return ApiError(message, 503, code="unavailable", retry_after=5)
    return ApiError(_REPLICA_LOST, 503, code="replica_lost", retry_after=1)
