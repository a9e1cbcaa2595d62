"""/admin/keys and /admin/tenants: what `penstock keys` does, over HTTP, for keys with the admin role."""

from __future__ import annotations

import time

from fastapi import FastAPI, Request
from starlette.responses import Response

from penstock.core.errors import PermissionDeniedError
from penstock.serving.gateway.accounts.admin import MAX_PAGE, KeyAdmin
from penstock.serving.gateway.answers import json_response
from penstock.serving.gateway.body import read_object
from penstock.serving.gateway.context import context_of
from penstock.serving.gateway.schemas.admin import (
    CreateKeyBody,
    KeyList,
    RotateKeyBody,
    TenantBody,
    TenantList,
    key_object,
    tenant_object,
)
from penstock.serving.gateway.state import Gateway

KEYS_PATH = "/admin/keys"
TENANTS_PATH = "/admin/tenants"
DEFAULT_PAGE = 100


def add_routes(app: FastAPI, gateway: Gateway, admin: KeyAdmin) -> None:
    """The security middleware lets only admins come here; the role is checked again, so that no mistake there opens this."""
    _add_key_routes(app, admin)
    _add_tenant_routes(app, admin)


def _add_key_routes(app: FastAPI, admin: KeyAdmin) -> None:
    @app.post(
        KEYS_PATH,
        response_model=None,
        summary="Make a key; the answer is the only one with its secret.",
        tags=["admin"],
    )
    async def create_key(request: Request) -> Response:
        actor = _check_admin(request)
        body = CreateKeyBody.parse(await read_object(request))
        now = time.time()
        created = await admin.create(body.tenant, body.role, body.settings(now), actor=actor)
        return _secret(json_response(key_object(created.info, now, created.token)))

    @app.get(KEYS_PATH, response_model=None, summary="Keys, by id.", tags=["admin"])
    async def list_keys(
        request: Request, tenant: str | None = None, after: str = "", limit: int = DEFAULT_PAGE
    ) -> Response:
        _check_admin(request)
        size = min(max(limit, 1), MAX_PAGE)
        found = await admin.keys(tenant, after=after, limit=size)
        now = time.time()
        return json_response(
            KeyList([key_object(info, now) for info in found], found[-1].id if len(found) == size else None)
        )

    @app.get(KEYS_PATH + "/{key_id}", response_model=None, summary="One key.", tags=["admin"])
    async def show_key(request: Request, key_id: str) -> Response:
        _check_admin(request)
        return json_response(key_object(await admin.show(key_id), time.time()))

    @app.delete(KEYS_PATH + "/{key_id}", response_model=None, summary="Revoke a key, for good.", tags=["admin"])
    async def revoke_key(request: Request, key_id: str) -> Response:
        actor = _check_admin(request)
        return json_response(key_object(await admin.revoke(key_id, actor=actor), time.time()))

    @app.post(
        KEYS_PATH + "/{key_id}/rotate",
        response_model=None,
        summary="Make a key that takes the place of another.",
        tags=["admin"],
    )
    async def rotate_key(request: Request, key_id: str) -> Response:
        actor = _check_admin(request)
        body = RotateKeyBody.parse(await read_object(request))
        created = await admin.rotate(key_id, actor=actor, grace_s=body.grace_s())
        return _secret(json_response(key_object(created.info, time.time(), created.token)))


def _add_tenant_routes(app: FastAPI, admin: KeyAdmin) -> None:
    @app.get(TENANTS_PATH, response_model=None, summary="Tenants, by name.", tags=["admin"])
    async def list_tenants(request: Request) -> Response:
        _check_admin(request)
        return json_response(TenantList([tenant_object(info) for info in await admin.tenants()]))

    @app.get(TENANTS_PATH + "/{name}", response_model=None, summary="One tenant.", tags=["admin"])
    async def show_tenant(request: Request, name: str) -> Response:
        _check_admin(request)
        return json_response(tenant_object(await admin.tenant(name)))

    @app.put(TENANTS_PATH + "/{name}", response_model=None, summary="Set all limits of a tenant.", tags=["admin"])
    async def put_tenant(request: Request, name: str) -> Response:
        actor = _check_admin(request)
        body = TenantBody.parse(await read_object(request))
        return json_response(tenant_object(await admin.set_tenant(name, body.settings(), actor=actor)))


def _check_admin(request: Request) -> str:
    """Who asks, for the log. Raises PermissionDeniedError."""
    identity = context_of(request.scope).identity
    if identity.method == "none" or identity.role != "admin":
        raise PermissionDeniedError("This needs an admin key.")
    return identity.key_id


def _secret(response: Response) -> Response:
    response.headers["Cache-Control"] = "no-store"
    return response
