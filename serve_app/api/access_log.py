"""One line of the log per request: what was asked for and how it went, never what was said."""

import logging
import re
import time
import uuid
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("ray.serve")

HEADER = "x-request-id"

_FAIR = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_QUIET = frozenset({"/health", "/ready", "/metrics"})  # asked for every few seconds


def request_id(headers: Headers) -> str:
    """The client's own name for its request, if it is a fair one; else a new one."""
    given = headers.get(HEADER, "")
    return given if _FAIR.fullmatch(given) else uuid.uuid4().hex


def notes(scope: Scope) -> dict[str, Any]:
    """What will be told about this request; whoever answers it adds to it."""
    return scope.setdefault("state", {}).setdefault("journal", {})


@dataclass(frozen=True)
class Journal:
    """Names every request, and logs it when its answer has ended: at INFO, or WARNING for a fault of the server."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI protocol."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        line = notes(scope)
        line |= {"request": request_id(Headers(scope=scope)), "method": scope["method"], "path": scope["path"]}
        began = time.monotonic()

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                line["status"] = message["status"]
                MutableHeaders(scope=message).setdefault(HEADER, line["request"])
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            line["seconds"] = round(time.monotonic() - began, 4)
            _log(line)


def _log(line: dict[str, Any]) -> None:
    status = line.setdefault("status", 499)  # nothing was sent: the client had gone
    if status >= 500 or line["path"] not in _QUIET:
        level = logging.WARNING if status >= 500 else logging.INFO
        logger.log(level, "request", extra={"log_to_stderr": False, **line})
