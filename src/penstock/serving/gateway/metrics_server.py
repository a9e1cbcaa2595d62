"""/metrics on a port of its own (--metrics-port), without identity: for a network that only the monitoring reaches.

An application that the server runs beside the main one. It has two routes and knows nothing of the rest.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.core.errors import ErrorInfo
from penstock.serving.gateway.answers import json_response
from penstock.serving.gateway.errors import error_response
from penstock.serving.gateway.middleware.error_boundary import ErrorBoundaryMiddleware
from penstock.serving.gateway.middleware.hosts import HostRules, HostsMiddleware
from penstock.serving.gateway.middleware.request_id import RequestIdMiddleware
from penstock.serving.gateway.schemas.responses import Status
from penstock.serving.gateway.security.addresses import is_loopback
from penstock.telemetry.exporter import CONTENT_TYPE


class MetricsApp:
    """GET /metrics answers with what `render` returns, GET /health/live with 200."""

    def __init__(self, render: Callable[[], Awaitable[bytes]]) -> None:
        self._render = render

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        response = await self._answer(scope)
        await response(scope, receive, send)

    async def _answer(self, scope: Scope) -> Response:
        path = scope["path"]
        if path not in ("/metrics", "/health/live"):
            return error_response(_refusal(404, "Unknown route; there is /metrics.", "not_found"))
        if scope["method"] not in ("GET", "HEAD"):
            return error_response(
                _refusal(405, f"{path} takes GET only.", "method_not_allowed"), {"Allow": "GET, HEAD"}
            )
        if path == "/health/live":
            return json_response(Status("live"))
        return Response(await self._render(), media_type=CONTENT_TYPE)


def create_metrics_app(render: Callable[[], Awaitable[bytes]], host: str) -> ASGIApp:
    """The application for an address to listen on; on a loopback one it answers to loopback names only (DNS rebinding)."""
    app: ASGIApp = HostsMiddleware(MetricsApp(render), HostRules(loopback=is_loopback(host)))
    return RequestIdMiddleware(ErrorBoundaryMiddleware(app))


def _refusal(status: int, message: str, code: str) -> ErrorInfo:
    return ErrorInfo(message=message, status=status, type="invalid_request_error", code=code)
