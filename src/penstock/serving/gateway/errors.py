"""One place renders errors: OpenAI's error object, the status that makes its client raise the right class, Retry-After.

What the client is told is the RequestError's message; an exception that nobody foresaw becomes a generic 500 that carries the
request id, and its details go to the log only.
"""

from __future__ import annotations

import logging
import math

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from penstock.core.errors import (
    AbortedError,
    AuthenticationError,
    EngineError,
    ErrorInfo,
    OverloadedError,
    RateLimitError,
    RequestError,
    StoreUnavailableError,
)
from penstock.core.log import current_request_id, one_line
from penstock.serving.gateway.schemas.responses import ErrorBody, ErrorObject

logger = logging.getLogger(__name__)

_MAX_PATH_SHOWN = 128


def error_body(info: ErrorInfo) -> bytes:
    """The JSON of OpenAI's error object; all four fields are always there."""
    return msgspec.json.encode(ErrorBody(ErrorObject(info.message, info.type, info.param, info.code)))


def error_response(info: ErrorInfo, headers: dict[str, str] | None = None) -> Response:
    """The error as a whole HTTP response."""
    return Response(error_body(info), status_code=info.status, headers=headers, media_type="application/json")


def as_request_error(error: BaseException) -> RequestError:
    """`error` itself, or for one that nobody foresaw (logged here) a generic EngineError with the request id."""
    if isinstance(error, RequestError):
        if error.status >= 500 and error.__cause__ is not None:
            logger.error("request failed: %s", error.message, exc_info=error.__cause__)
        return error
    logger.error("request failed unexpectedly", exc_info=error)
    return EngineError(_generic_message(), code="internal_error")


def internal_error() -> ErrorInfo:
    """What a client is told about a fault of ours."""
    return ErrorInfo(message=_generic_message(), status=500, code="internal_error")


def _generic_message() -> str:
    return f"Internal error. If you report it, please give the request id {current_request_id()}."


def retry_headers(error: RequestError) -> dict[str, str] | None:
    """What a client needs to know besides the body: after how long a retry can help (whole seconds, rounded up, and the exact
    milliseconds that OpenAI's clients read), and how to prove who it is."""
    if isinstance(error, AuthenticationError):
        return {"WWW-Authenticate": "Bearer"}
    headers: dict[str, str] = {}
    if isinstance(error, RateLimitError):
        headers = {name.decode(): value.decode() for name, value in error.headers.items()}
    seconds: float | None = None
    if isinstance(error, OverloadedError | RateLimitError | StoreUnavailableError):
        seconds = error.retry_after_s
    if seconds is None:
        return headers or None
    if seconds <= 0:
        # When nobody knows: not at once.
        seconds = 1.0
    return headers | {"Retry-After": str(max(1, math.ceil(seconds))), "retry-after-ms": str(math.ceil(seconds * 1000))}


async def render_request_error(scope: Scope, receive: Receive, send: Send, error: RequestError) -> None:
    """Answer with `error` from a middleware."""
    await error_response(error.info, retry_headers(error))(scope, receive, send)


async def _on_request_error(request: Request, error: Exception) -> Response:
    known = as_request_error(error)
    if isinstance(known, AbortedError):
        logger.info("client went away")
    return error_response(known.info, retry_headers(known))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """The framework's own refusals: unknown route, method not allowed."""
    if not isinstance(error, HTTPException):
        raise error
    path = one_line(request.url.path[:_MAX_PATH_SHOWN])
    headers = dict(error.headers) if error.headers else None
    if error.status_code == 404:
        return error_response(_refusal(404, f"Unknown route: {request.method} {path}.", "not_found"), headers)
    if error.status_code == 405:
        return error_response(_refusal(405, f"{path} does not take {request.method}.", "method_not_allowed"), headers)
    status = 400 if error.status_code == 422 else error.status_code
    return error_response(_refusal(status, str(error.detail), "invalid_request"), headers)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    """A path or query value of the wrong type; the framework's own answer would be 422."""
    return error_response(_refusal(400, "A path or query parameter is not valid.", "invalid_value"))


def _refusal(status: int, message: str, code: str) -> ErrorInfo:
    return ErrorInfo(message=message, status=status, type="invalid_request_error", code=code)


def add_error_handlers(app: FastAPI) -> None:
    """Every error that a route or the framework raises leaves in one shape."""
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
