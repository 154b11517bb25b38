"""Errors of the HTTP API, always as `{"error": {message, type, param, code}}`."""

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

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "overloaded_error",
}

DRAINING_RETRY_SECONDS = 5
"""`Retry-After` of a draining server. By then a load balancer sends the client to another server."""


class ApiError(Exception):
    """An error response: a sentence for the client, the HTTP status, the field at fault and a code to branch on.

    Without `retry_after`, in seconds, clients are asked not to retry.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        extra_headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.retry_after, self._extra_headers = retry_after, dict(extra_headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that clients of OpenAI's API expect."""
        kind = _ERROR_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers that HTTP clients (`Retry-After`) and openai's client (`x-should-retry`) act on."""
        retry = {"x-should-retry": "false"} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        authenticate = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return retry | authenticate | self._extra_headers

    @property
    def response(self) -> JSONResponse:
        """The complete response."""
        return JSONResponse(self.body, self.status, self.headers)


def context_length_exceeded(limit: int, prompt: int, completion: int) -> ApiError:
    """Return the error of a request that is too long, in OpenAI's words, which agents search for."""
    return ApiError(
        f"This model's maximum context length is {limit} tokens. However, you requested {prompt + completion} tokens "
        f"({prompt} in the messages, {completion} in the completion). Please reduce the length of the messages or "
        "completion.",
        code="context_length_exceeded",
    )


def error_summary(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def to_api_error(error: Exception) -> ApiError:
    """Convert any exception to an error response. An unexpected one is logged, and the client gets a plain 500."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _from_validation_error(error)
        case HTTPException():
            return ApiError(str(error.detail), error.status_code, extra_headers=error.headers)
        case QueueFullError():
            return ApiError(str(error), 429, code="queue_full", retry_after=error.retry_after)
        case DrainingError():
            return ApiError(str(error), 503, code="draining", retry_after=DRAINING_RETRY_SECONDS)
        case DeadlineError():
            waiting = " The request was still in the queue." if error.was_waiting else ""
            return ApiError(f"{error}{waiting}", 408, code="deadline")
        case RequestRejected():
            return ApiError(str(error), code="request_too_large")
        case UserError():
            return ApiError(str(error))
    logger.error("request failed", exc_info=error)
    return ApiError("The server failed on this request. See its log for the reason.", 500)


def _from_validation_error(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    context = first.get("ctx") or {}
    if first["type"] == "json_invalid":
        return ApiError(f"The body is not valid JSON: {context.get('error', first['msg'])}.")
    if len(first["loc"]) == 1 and "param" not in context:
        return ApiError("The body must be a JSON object, sent with `Content-Type: application/json`.")
    param = context.get("param") or ".".join(str(part) for part in first["loc"][1:])
    return ApiError(f"{param}: {first['msg'].removeprefix('Value error, ')}", param=param)


def install_error_handlers(app: FastAPI) -> None:
    """Convert each error of `app` to the one error format, including FastAPI's own."""

    async def respond(_: Request, error: Exception) -> JSONResponse:
        return to_api_error(error).response

    for kind in (ApiError, RequestRejected, UserError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, respond)
