"""What a client is told when a request cannot be answered: always `{"error": {message, type, param, code}}`."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from baklava.errors import UserError
from serve_app.engine.types import DeadlineError, DrainingError, QueueFullError, RequestRejected

logger = logging.getLogger("ray.serve")

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "overloaded_error",
}


DRAINING_RETRY_SECONDS = 5
"""Seconds after which a client may ask again: whoever stands in front has found another server by then."""


class ApiError(Exception):
    """One sentence for a client of the endpoint, with its HTTP status, the field it is about and a code to branch on.

    `retry_after` is in seconds; without it clients are asked not to retry what would fail again. `more` are headers.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        more: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.retry_after, self._more = retry_after, dict(more or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that clients of OpenAI's API expect."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What generic HTTP clients, and openai's (`x-should-retry`), act on."""
        retry = {"x-should-retry": "false"} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return retry | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {}) | self._more

    @property
    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, self.headers)


def context_length_exceeded(limit: int, prompt: int, completion: int) -> ApiError:
    """The refusal of a text that is too long, in the words that agents search for."""
    return ApiError(
        f"This model's maximum context length is {limit} tokens. However, you requested {prompt + completion} tokens "
        f"({prompt} in the messages, {completion} in the completion). Please reduce the length of the messages or "
        "completion.",
        code="context_length_exceeded",
    )


def as_api_error(error: Exception) -> ApiError:
    """What to tell the client about any exception; one that nobody foresaw goes to the log instead."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        return ApiError(str(error.detail), error.status_code, more=error.headers)
    if isinstance(error, RequestRejected):
        return _of_refusal(error)
    if isinstance(error, UserError):
        return ApiError(str(error))
    logger.error("request failed", exc_info=error)
    return ApiError("The server failed on this request; its log says why.", 500)


def _of_refusal(refusal: RequestRejected) -> ApiError:
    match refusal:
        case QueueFullError():
            return ApiError(str(refusal), 429, code="queue_full", retry_after=refusal.retry_after)
        case DrainingError():
            return ApiError(str(refusal), 503, code="draining", retry_after=DRAINING_RETRY_SECONDS)
        case DeadlineError(waiting=True):
            return ApiError(f"{refusal} It was still waiting for its turn.", 408, code="deadline")
        case DeadlineError():
            return ApiError(str(refusal), 408, code="deadline")
    return ApiError(str(refusal), code="request_too_large")


def _of_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    context = first.get("ctx") or {}
    if first["type"] == "json_invalid":
        return ApiError(f"The body is not valid JSON: {context.get('error', first['msg'])}.")
    if len(first["loc"]) == 1 and "param" not in context:
        return ApiError("The body must be a JSON object, sent with `Content-Type: application/json`.")
    param = context.get("param") or ".".join(str(part) for part in first["loc"][1:])
    return ApiError(f"{param}: {first['msg'].removeprefix('Value error, ')}", param=param)


async def _answer(_: Request, error: Exception) -> JSONResponse:
    return as_api_error(error).response


def install(app: FastAPI) -> None:
    """Give every error of `app` this one shape, FastAPI's own included."""
    for kind in (ApiError, RequestRejected, UserError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer)
