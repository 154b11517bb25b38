"""What stands before every route: API keys, the names that this machine goes by, and a bound on the body."""

import base64
import hmac
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.network import key_digest
from serve_app.openai.errors import ApiError

OPEN_PATHS = frozenset({"/health"})

_READING = frozenset({"GET", "HEAD"})


@dataclass(frozen=True)
class KeyGuard:
    """Answers 401 to every request without one of the keys, except on the open paths; no digests, no guard.

    A browser may give a key as the password of HTTP's basic scheme, to read only: it would send one along with
    whatever another site made it send.
    """

    app: ASGIApp
    digests: Iterable[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI protocol."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or not self.digests or self._knows(scope):
            await self.app(scope, receive, send)
            return
        error = ApiError("Unknown API key; send `Authorization: Bearer KEY`.", 401, code="invalid_api_key")
        response = error.response
        if scope["path"] == "/":
            response.headers["WWW-Authenticate"] = 'Basic realm="baklava: any name, and an API key as password"'
        await response(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        key = presented_key(scope)
        return key is not None and is_among(key, self.digests)


def presented_key(scope: Scope) -> str | None:
    """The API key that a request comes with."""
    scheme, _, rest = Headers(scope=scope).get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic" and scope["method"] in _READING:
        try:
            _, colon, password = base64.b64decode(rest.strip(), validate=True).decode().partition(":")
        except ValueError:  # no base64, no ASCII or no UTF-8
            return None
        return password if colon else None
    return None


def is_among(key: str, digests: Iterable[str]) -> bool:
    """Whether this is one of the keys; every digest is compared, in constant time, so that time tells nothing."""
    presented = key_digest(key)
    matches = [hmac.compare_digest(presented, digest) for digest in digests]
    return any(matches)


@dataclass(frozen=True)
class HostGuard:
    """Answers 403 to requests for a machine of another name, where no key protects the server.

    A web page that someone on this machine looks at could otherwise talk to it, under a name of its own that
    resolves to a loopback address. `name` is one that the server was told to listen on.
    """

    app: ASGIApp
    name: str = "localhost"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI protocol."""
        host = Headers(scope=scope).get("host", "").lower() if scope["type"] == "http" else "localhost"
        if _is_this_machine(host, self.name):
            await self.app(scope, receive, send)
        else:
            message = "Without API keys this server is only for requests to localhost; set BAKLAVA_API_KEYS for others."
            await ApiError(message, 403, code="unknown_host").response(scope, receive, send)


def _is_this_machine(host: str, own: str) -> bool:
    name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
    if name in ("", "localhost", own) or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class BodyGuard:
    """Reads a body before the app does and answers 413 once more than `limit` bytes came, whatever was announced."""

    app: ASGIApp
    limit: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI protocol."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.limit:
                await ApiError(f"The body is larger than {self.limit} bytes.", 413).response(scope, receive, send)
                return
        await self.app(scope, _replay(bytes(body), receive), send)


def _replay(body: bytes, receive: Receive) -> Receive:
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        if pending:
            return pending.pop()
        try:
            return await receive()
        except Exception:  # the server in front is gone, and the client with it
            return {"type": "http.disconnect"}

    return replay
