"""One log line and one set of metrics per HTTP request."""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.core.log import one_line
from penstock.serving.gateway.context import context_of
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder

logger = logging.getLogger("penstock.access")

_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_QUIET_ROUTES = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})
_MAX_PATH_SHOWN = 256
UNMATCHED = "unmatched"
# Seconds from the head of the request to the head of the response.
LATENCY_HEADER = b"x-request-latency"


class AccessMiddleware:
    """Counts and logs requests. Routes are labelled by their template, unknown ones by "unmatched"; probes are logged at debug."""

    def __init__(self, app: ASGIApp, recorder: Recorder) -> None:
        self.app = app
        self.recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                latency = f"{time.perf_counter() - started:.6f}s".encode()
                message["headers"] = [*message.get("headers", ()), (LATENCY_HEADER, latency)]
            await send(message)

        self.recorder.increment(metrics.HTTP_IN_FLIGHT)
        try:
            await self.app(scope, receive, send_and_note)
        finally:
            self.recorder.increment(metrics.HTTP_IN_FLIGHT, by=-1)
            self._note(scope, status, time.perf_counter() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = context_of(scope).route or str(getattr(scope.get("route"), "path", UNMATCHED))
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self.recorder.increment(metrics.HTTP_REQUESTS, route, method, f"{status // 100}xx")
        self.recorder.observe(metrics.HTTP_REQUEST_SECONDS, seconds, route)
        level = logging.DEBUG if route in _QUIET_ROUTES else logging.INFO
        if logger.isEnabledFor(level):
            client = scope.get("client")
            path = one_line(scope["path"][:_MAX_PATH_SHOWN])
            fields = {"method": method, "path": path, "status": status, "seconds": round(seconds, 6)}
            peer = f"{client[0]}:{client[1]}" if client else "-"
            logger.log(
                level, "%s %s %s %d %.1f ms", peer, method, path, status, seconds * 1000, extra={"fields": fields}
            )
