"""Says no before a body is read, where that can be known: while the server goes down, when the key's requests of this minute are used
up, and when the engine is full and no cache could answer.

A refusal here costs microseconds; behind the body it costs parsing.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.core.errors import OverloadedError, RequestError
from penstock.serving.gateway.context import context_of
from penstock.serving.gateway.errors import render_request_error
from penstock.serving.gateway.security.routes import route_path
from penstock.serving.gateway.state import Gateway
from penstock.telemetry import metrics

# Requests whose bodies are read or looked up at the same time; what comes on top would only make all of them slower.
MAX_PREPARING = 1024


class GateMiddleware:
    """`paths`: the generation endpoints."""

    def __init__(self, app: ASGIApp, gateway: Gateway, paths: frozenset[str]) -> None:
        self.app = app
        self._gateway = gateway
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or route_path(scope)[0] not in self._paths:
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await render_request_error(scope, receive, send, refusal)
            return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        gateway = self._gateway
        if gateway.draining:
            return self._count(OverloadedError("The server is shutting down.", retry_after_s=1.0), "draining")
        known = gateway.services.limiter.refusal_known(context_of(scope).identity)
        if known is not None:
            return known
        if gateway.preparing >= MAX_PREPARING:
            return self._count(OverloadedError("Too many requests arrive at once.", retry_after_s=1.0), "preparing")
        if len(gateway.clients) == 1 and not self._cache_may_answer(scope):
            (model,) = gateway.clients
            if gateway.services.admission.overloaded(model):
                return gateway.services.admission.refuse(model)
        return None

    def _cache_may_answer(self, scope: Scope) -> bool:
        if not self._gateway.services.cache.enabled:
            return False
        return not any(name == b"cache-control" and b"no-store" in value.lower() for name, value in scope["headers"])

    def _count(self, error: OverloadedError, reason: str) -> OverloadedError:
        self._gateway.recorder.increment(metrics.REFUSED, reason)
        return error
