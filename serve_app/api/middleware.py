"""ASGI middleware around the routes: access log, HEAD and slashes, API keys, host check, and a limit on the body."""

import base64
import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.network import key_digest
from serve_app.openai.errors import ApiError

logger = logging.getLogger("ray.serve")

REQUEST_ID_HEADER = "x-request-id"

_VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_POLLED_PATHS = frozenset({"/health", "/ready", "/metrics"})  # logged only if they fail
_MODEL_PATH = "/v1/models/"
_PATHS_WITHOUT_KEY = frozenset({"/health"})


def request_id(headers: Headers) -> str:
    """Return the client's id for its request if it is a valid one, else a new one."""
    client_id = headers.get(REQUEST_ID_HEADER, "")
    return client_id if _VALID_REQUEST_ID.fullmatch(client_id) else uuid.uuid4().hex


def request_log(scope: Scope) -> dict[str, Any]:
    """Return the fields that the access log will write for this request. Handlers add to them."""
    return scope.setdefault("state", {}).setdefault("access_log", {})


@dataclass(frozen=True)
class AccessLogMiddleware:
    """Give each request an id, and log one line when its response has ended, without prompts and answers.

    The level is INFO, or WARNING for a fault of the server.
    """

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request as ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        fields = request_log(scope)
        fields |= {"request": request_id(Headers(scope=scope)), "method": scope["method"], "path": scope["path"]}
        started = time.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                fields["status"] = message["status"]
                MutableHeaders(scope=message).setdefault(REQUEST_ID_HEADER, fields["request"])
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            fields["seconds"] = round(time.monotonic() - started, 4)
            status = fields.setdefault("status", 499)  # nothing was sent, because the client disconnected
            if status >= 500 or _without_slash(fields["path"]) not in _POLLED_PATHS:
                level = logging.WARNING if status >= 500 else logging.INFO
                logger.log(level, "request", extra={"log_to_stderr": False, **fields})


@dataclass(frozen=True)
class MonitorRequestMiddleware:
    """Treat HEAD as GET without a body, and a path with a trailing slash as the path without it, as monitors expect."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request as ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_head = scope["method"] == "HEAD"

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        scope = {**scope, "method": "GET" if is_head else scope["method"], "path": _without_slash(scope["path"])}
        await self.app(scope, receive, send_without_body if is_head else send)


def _without_slash(path: str) -> str:
    """Return a path without its trailing slash, unless it ends with the name of a model, which may be a directory."""
    names_model = path.startswith(_MODEL_PATH) and path != _MODEL_PATH
    return path if names_model else path.rstrip("/") or "/"


@dataclass(frozen=True)
class ApiKeyMiddleware:
    """Answer 401 to requests without a valid key, except for /health. Without digests all requests pass.

    A browser may send a key as the password of HTTP's basic scheme, but only to read: it also sends that password
    with requests that another site makes it send.
    """

    app: ASGIApp
    digests: Iterable[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request as ASGI."""
        if scope["type"] != "http" or scope["path"] in _PATHS_WITHOUT_KEY or not self.digests:
            await self.app(scope, receive, send)
            return
        key = extract_api_key(scope)
        if key is not None and matches_any(key, self.digests):
            await self.app(scope, receive, send)
            return
        error = ApiError("Invalid API key; send `Authorization: Bearer KEY`.", 401, code="invalid_api_key")
        response = error.response
        if scope["path"] == "/":
            response.headers["WWW-Authenticate"] = 'Basic realm="baklava: any name, and an API key as password"'
        await response(scope, receive, send)


def extract_api_key(scope: Scope) -> str | None:
    """Return the API key of a request, or None if it has none."""
    scheme, _, rest = Headers(scope=scope).get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic" and scope["method"] == "GET":
        try:
            _, colon, password = base64.b64decode(rest.strip(), validate=True).decode().partition(":")
        except ValueError:  # not base64, not ASCII, or not UTF-8
            return None
        return password if colon else None
    return None


def matches_any(key: str, digests: Iterable[str]) -> bool:
    """Return whether this is one of the keys, in a time that depends neither on the key nor on which one matches."""
    digest = key_digest(key)
    return any([hmac.compare_digest(digest, other) for other in digests])  # noqa: C419  # compares all of them


@dataclass(frozen=True)
class HostCheckMiddleware:
    """Answer 403 to requests whose `Host` is not this machine, on a server without API keys.

    Otherwise a web page that is open on this machine could reach the server, under a name of its own that resolves to
    a loopback address. `name` is the host that the server listens on.
    """

    app: ASGIApp
    name: str = "localhost"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request as ASGI."""
        if scope["type"] != "http" or _is_this_machine(Headers(scope=scope).get("host", "").lower(), self.name):
            await self.app(scope, receive, send)
        else:
            message = "Without API keys this server answers requests to localhost only; set BAKLAVA_API_KEYS."
            await ApiError(message, 403, code="unknown_host").response(scope, receive, send)


def _is_this_machine(host: str, own_name: str) -> bool:
    name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
    if name in ("", "localhost", own_name) or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class BodyLimitMiddleware:
    """Read the body before the app does, and answer 413 after `limit` bytes, whatever its Content-Length says."""

    app: ASGIApp
    limit: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request as ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = bytearray()
        more_body = True
        while more_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more_body = message.get("more_body", False)
            if len(body) > self.limit:
                await ApiError(f"The body is larger than {self.limit} bytes.", 413).response(scope, receive, send)
                return
        unread: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            if unread:
                return unread.pop()
            try:
                return await receive()
            except Exception:  # the proxy in front is gone, and the client with it
                return {"type": "http.disconnect"}

        await self.app(scope, replay, send)
