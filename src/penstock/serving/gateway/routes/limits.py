"""GET and PATCH /v1/engine/limits: the live limits of an engine, below the ceiling fixed at its start.

Changing them is for administrators: an identity with the role admin, or, on a server without authentication, whoever reaches its
loopback address.
"""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from starlette.responses import Response

from penstock.core.errors import PermissionDeniedError
from penstock.core.types import LiveLimits
from penstock.serving.gateway.answers import json_response
from penstock.serving.gateway.body import read_object
from penstock.serving.gateway.context import context_of
from penstock.serving.gateway.identity import Identity
from penstock.serving.gateway.schemas import responses
from penstock.serving.gateway.schemas.other import LimitsBody
from penstock.serving.gateway.security.addresses import is_loopback
from penstock.serving.gateway.state import Gateway

logger = logging.getLogger(__name__)

PATH = "/v1/engine/limits"


def add_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.get(PATH, response_model=None, summary="The live limits in force.", tags=["operations"])
    async def get_limits(request: Request, model: str | None = None) -> Response:
        name, client = gateway.resolve(model, context_of(request.scope).identity)
        return _render(name, await client.configure(LiveLimits()))

    @app.patch(PATH, response_model=None, summary="Change live limits.", tags=["operations"])
    async def change_limits(request: Request) -> Response:
        _check_admin(gateway, context_of(request.scope).identity)
        body = LimitsBody.parse(await read_object(request))
        name, client = gateway.resolve(body.model)
        limits = await client.configure(body.limits())
        logger.info("limits of %s are now %s", name, limits)
        return _render(name, limits)


def _check_admin(gateway: Gateway, identity: Identity) -> None:
    if identity.method == "none":
        if not is_loopback(gateway.config.host):
            raise PermissionDeniedError(
                "Without authentication, limits can be changed only while the server listens on a loopback address."
            )
    elif identity.role != "admin":
        raise PermissionDeniedError("Limits can be changed only with an admin key.")


def _render(model: str, limits: LiveLimits) -> Response:
    return json_response(
        responses.Limits(
            model, limits.max_num_batched_tokens, limits.max_num_seqs, limits.max_prefill_tokens_while_decoding
        )
    )
