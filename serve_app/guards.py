"""What stands before every route: API keys and a bound on the body."""

import hmac
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import ApiError
from serve_app.listen import key_digest

OPEN_PATHS = frozenset({"/health"})


@dataclass(frozen=True)
class KeyGuard:
    """Answers 401 to every request without one of the keys, except on the open paths; no digests, no guard."""

    app: ASGIApp
    digests: Iterable[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI protocol."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or not self.digests or self._knows(scope):
            await self.app(scope, receive, send)
        else:
            error = ApiError("Unknown API key; send `Authorization: Bearer KEY`.", 401, code="invalid_api_key")
            await error.response(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        presented = key_digest(key.strip())
        # Every digest is compared, in constant time each, so that time tells nothing about the keys.
        matches = [hmac.compare_digest(presented, digest) for digest in self.digests]
        return scheme.lower() == "bearer" and any(matches)


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
