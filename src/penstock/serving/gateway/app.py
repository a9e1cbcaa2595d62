"""The gateway as an ASGI application.

    RequestId → Access (log, metrics) → ErrorBoundary → BodyLimit → FastAPI routes → EngineClient

What does not belong here: anything about one route (routes/), about bytes on the connection (streaming/), or about processes and
signals (server.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI

from penstock.core.config import ServerConfig
from penstock.serving.frontend.client import EngineClient
from penstock.serving.gateway.errors import add_error_handlers
from penstock.serving.gateway.middleware.access import AccessMiddleware
from penstock.serving.gateway.middleware.body_limit import BodyLimitMiddleware
from penstock.serving.gateway.middleware.error_boundary import ErrorBoundaryMiddleware
from penstock.serving.gateway.middleware.request_id import RequestIdMiddleware
from penstock.serving.gateway.openapi import describe
from penstock.serving.gateway.routes import chat, completions, limits, models, operations, tokens
from penstock.serving.gateway.state import Gateway
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder


def create_app(
    clients: Mapping[str, EngineClient], config: ServerConfig, recorder: Recorder | None = None, *, version: str = "0"
) -> FastAPI:
    """The application that serves `clients` (model name → engine). Its `state.gateway` is the Gateway that routes share.

    `clients` is read at every request, so a model may be added or removed while the server runs.
    """
    gateway = Gateway(clients, config, recorder if recorder is not None else Recorder(), version)
    gateway.recorder.set(metrics.BUILD_INFO, 1, version)
    app = FastAPI(
        title="Penstock",
        version=version,
        description="An OpenAI-compatible inference server.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        max_body_size=None,
    )
    app.state.gateway = gateway
    for module in (completions, chat, models, tokens, limits, operations):
        module.add_routes(app, gateway)
    add_error_handlers(app)
    app.add_middleware(BodyLimitMiddleware, max_bytes=config.max_body_bytes)
    app.add_middleware(ErrorBoundaryMiddleware)
    app.add_middleware(AccessMiddleware, recorder=gateway.recorder)
    app.add_middleware(RequestIdMiddleware)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    return app
