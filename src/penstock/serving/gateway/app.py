"""The gateway as an ASGI application.

    RequestId → Access (log, metrics) → ErrorBoundary → security (who asks) → Gate (early refusals) → BodyLimit → generation endpoints
                                                                                                                └→ FastAPI routes

What does not belong here: anything about one route (routes/, generation/), about bytes on the connection (streaming/), or about
processes and signals (server.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.core.config import ServerConfig
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.frontend.client import EngineClient
from penstock.serving.gateway.context import context_of
from penstock.serving.gateway.errors import add_error_handlers
from penstock.serving.gateway.generation.chat import CHAT
from penstock.serving.gateway.generation.completions import COMPLETIONS
from penstock.serving.gateway.generation.endpoint import GenerationEndpoint
from penstock.serving.gateway.middleware.access import AccessMiddleware
from penstock.serving.gateway.middleware.body_limit import BodyLimitMiddleware
from penstock.serving.gateway.middleware.error_boundary import ErrorBoundaryMiddleware
from penstock.serving.gateway.middleware.gate import GateMiddleware
from penstock.serving.gateway.middleware.request_id import RequestIdMiddleware
from penstock.serving.gateway.openapi import describe
from penstock.serving.gateway.routes import limits, models, operations, tokens
from penstock.serving.gateway.security.build import add_security
from penstock.serving.gateway.security.routes import route_path
from penstock.serving.gateway.services import Services, build_services
from penstock.serving.gateway.state import Gateway
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder


class GatewayApp(FastAPI):
    """FastAPI for the routes of operators and documentation; requests go through `stack` first, which answers generations itself."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(
            title="Penstock",
            version=gateway.version,
            description="An OpenAI-compatible inference server.",
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            max_body_size=None,
        )
        self.state.gateway = gateway
        self.endpoints: dict[str, ASGIApp] = {
            CHAT.path: GenerationEndpoint(gateway, CHAT),
            COMPLETIONS.path: GenerationEndpoint(gateway, COMPLETIONS),
        }
        self.stack = _stack(self, gateway)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.stack(scope, receive, send)

    async def dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The innermost application."""
        endpoint = None
        if scope["type"] == "http" and scope["method"] == "POST":
            path, _ = route_path(scope)
            endpoint = self.endpoints.get(path)
        if endpoint is None:
            await super().__call__(scope, receive, send)
            return
        context_of(scope).route = path
        await endpoint(scope, receive, send)


class _Delegated(Response):
    """A route's response that an ASGI application writes."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def create_app(
    clients: Mapping[str, EngineClient],
    config: ServerConfig,
    recorder: Recorder | None = None,
    *,
    version: str = "0",
    settings: GatewayConfig | None = None,
    services: Services | None = None,
) -> GatewayApp:
    """The application that serves `clients` (model name → engine). Its `state.gateway` is the Gateway that routes share.

    `clients` is read at every request, so a model may be added or removed while the server runs. Without `services` there are those of
    one process without accounts.
    """
    recorder = recorder if recorder is not None else Recorder()
    settings = settings if settings is not None else GatewayConfig(auth="none")
    services = services if services is not None else build_services(settings, recorder, version)
    gateway = Gateway(clients, config, settings, recorder, services, version)
    gateway.recorder.set(metrics.BUILD_INFO, 1, version)
    app = GatewayApp(gateway)
    _describe_generation(app)
    for module in (models, tokens, limits, operations):
        module.add_routes(app, gateway)
    if services.admin is not None:
        from penstock.serving.gateway.routes import admin_keys

        admin_keys.add_routes(app, gateway, services.admin)
    add_error_handlers(app)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    return app


def _stack(app: GatewayApp, gateway: Gateway) -> ASGIApp:
    """The middleware, innermost first."""
    stack: ASGIApp = BodyLimitMiddleware(app.dispatch, gateway.config.max_body_bytes)
    stack = GateMiddleware(stack, gateway, frozenset(app.endpoints))
    stack = add_security(
        stack,
        gateway.settings,
        gateway.config,
        gateway.services.keys,
        gateway.recorder,
        tenants=gateway.services.admin,
    )
    stack = ErrorBoundaryMiddleware(stack)
    stack = AccessMiddleware(stack, gateway.recorder)
    return RequestIdMiddleware(stack)


def _describe_generation(app: GatewayApp) -> None:
    """The generation endpoints as routes: for the OpenAPI document and for 405."""

    @app.post(COMPLETIONS.path, response_model=None, summary="Continue a text.", tags=["generation"])
    async def create_completion(request: Request) -> Response:
        return _Delegated(app.endpoints[COMPLETIONS.path])

    @app.post(CHAT.path, response_model=None, summary="Answer a conversation.", tags=["generation"])
    async def create_chat_completion(request: Request) -> Response:
        return _Delegated(app.endpoints[CHAT.path])
