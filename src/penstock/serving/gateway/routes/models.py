"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from fastapi import FastAPI, Request
from msgspec import UNSET
from starlette.responses import Response

from penstock.core.errors import EngineDeadError
from penstock.serving.frontend.client import EngineClient
from penstock.serving.gateway.answers import json_response
from penstock.serving.gateway.context import context_of
from penstock.serving.gateway.schemas.responses import Model, ModelList
from penstock.serving.gateway.state import Gateway


def add_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/v1/models", response_model=None, summary="The models that are served.", tags=["models"])
    async def list_models(request: Request) -> Response:
        names = gateway.visible(context_of(request.scope).identity)
        models = [await _describe(gateway, name, gateway.clients[name]) for name in names]
        return json_response(ModelList("list", models))

    @app.get("/v1/models/{model:path}", response_model=None, summary="One model.", tags=["models"])
    async def get_model(request: Request, model: str) -> Response:
        name, client = gateway.resolve(model, context_of(request.scope).identity)
        return json_response(await _describe(gateway, name, client))


async def _describe(gateway: Gateway, name: str, client: EngineClient) -> Model:
    try:
        max_model_len = (await client.model_info()).max_model_len
    except EngineDeadError:
        return Model(name, "model", gateway.started_at, "penstock", UNSET)
    return Model(name, "model", gateway.started_at, "penstock", max_model_len)
