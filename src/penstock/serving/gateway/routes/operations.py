"""Health, metrics and version: what machines ask."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import Response

from penstock.core.errors import ErrorInfo
from penstock.serving.frontend.client import EngineClient
from penstock.serving.gateway.answers import json_response
from penstock.serving.gateway.errors import error_response
from penstock.serving.gateway.schemas.responses import Status, Version
from penstock.serving.gateway.state import Gateway
from penstock.telemetry.exporter import CONTENT_TYPE, EngineSample, render


def add_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health/live", response_model=None, summary="200 while this process answers.", tags=["operations"])
    async def live() -> Response:
        return json_response(Status("live"))

    @app.get("/health", response_model=None, summary="Another name of /health/ready.", tags=["operations"])
    @app.get(
        "/health/ready",
        response_model=None,
        summary="200 while every model serves requests, 503 with the reason otherwise.",
        tags=["operations"],
    )
    async def ready() -> Response:
        reason = gateway.unready()
        if reason:
            if gateway.settings.auth_methods:
                # Anybody may ask; names of models and reasons are in the log and in the metrics.
                reason = "The server is not ready."
            return error_response(ErrorInfo(message=reason, status=503, type="unavailable_error", code="not_ready"))
        return json_response(Status("ready"))

    @app.get("/metrics", response_model=None, summary="Prometheus metrics.", tags=["operations"])
    async def metrics() -> Response:
        return Response(await metrics_page(gateway), media_type=CONTENT_TYPE)

    @app.get("/version", response_model=None, summary="Version of the server.", tags=["operations"])
    async def version() -> Response:
        return json_response(Version(gateway.version))


async def metrics_page(gateway: Gateway) -> bytes:
    """What /metrics answers with: all gateway processes as one, and each engine once."""
    recorder = gateway.recorder if gateway.scrape is None else await gateway.scrape()
    return render(recorder, [await _sample(name, client) for name, client in gateway.clients.items()])


async def _sample(name: str, client: EngineClient) -> EngineSample:
    health = client.health()
    restarts = health.details.get("restarts", 0)
    return EngineSample(name, health.ready, restarts, await client.stats())
