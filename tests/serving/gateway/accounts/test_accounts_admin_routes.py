"""/admin/keys and /admin/tenants over HTTP."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.serving.gateway.accounts.admin import KeyAdmin
from penstock.serving.gateway.accounts.database import Database
from penstock.serving.gateway.accounts.keys import parse_key
from penstock.serving.gateway.context import RequestContext, set_context
from penstock.serving.gateway.errors import add_error_handlers
from penstock.serving.gateway.identity import ANONYMOUS, Identity
from penstock.serving.gateway.openapi import describe
from penstock.serving.gateway.routes import admin_keys
from penstock.serving.gateway.state import Gateway

ADMIN = Identity(tenant="ops", key_id="adminkey", method="key", role="admin")
USER = Identity(tenant="acme", key_id="userkey", method="key")
# Where the database plays no part.
ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


class Authenticated:
    """Stands for the security middleware: everybody is `identity`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.identity = ADMIN

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        set_context(scope, RequestContext("r1", self.identity))
        await self.app(scope, receive, send)


@pytest.fixture
def admin(database: Database) -> KeyAdmin:
    return KeyAdmin(database)


@pytest.fixture
def application(admin: KeyAdmin) -> Authenticated:
    app = FastAPI()
    add_error_handlers(app)
    # The routes use nothing of the gateway but accounts.
    admin_keys.add_routes(app, cast(Gateway, None), admin)
    return Authenticated(app)


@pytest.fixture
async def http(application: Authenticated) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def create(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await http.post("/admin/keys", json={"tenant": "acme", **body})
    assert response.status_code == 200, response.text
    return cast(dict[str, Any], response.json())


async def test_a_key_from_creation_to_the_end(http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "penstock")
    response = await http.post(
        "/admin/keys", json={"tenant": "acme", "rpm": 60, "budget": "12.50", "models": ["small"]}
    )
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    made = response.json()
    token = made.pop("key")
    parsed = parse_key(token)
    assert parsed is not None
    assert made["id"] == parsed.key_id
    assert (made["rpm"], made["budget"], made["spent"], made["models"]) == (60, "12.50", "0.00", ["small"])

    assert (await http.get(f"/admin/keys/{parsed.key_id}")).json() == made
    assert (await http.get("/admin/keys")).json() == {"object": "list", "data": [made], "next": None}

    response = await http.post(f"/admin/keys/{parsed.key_id}/rotate", json={"grace": "10m"})
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    new = response.json()
    assert parse_key(new["key"]) is not None
    assert (new["rpm"], new["budget"]) == (60, "12.50")
    old = (await http.get(f"/admin/keys/{parsed.key_id}")).json()
    assert (old["state"], old["replaced_by"]) == ("rotated", new["id"])

    response = await http.delete(f"/admin/keys/{new['id']}")
    assert (response.status_code, response.json()["state"]) == (200, "revoked")
    response = await http.post(f"/admin/keys/{new['id']}/rotate", json={})
    assert response.status_code == 400

    lines = [record.getMessage() for record in caplog.records if record.name.endswith("accounts.admin")]
    assert [line.split(" (")[0] for line in lines] == [
        f"adminkey created key {parsed.key_id}",
        f"adminkey rotated key {parsed.key_id}",
        f"adminkey revoked key {new['id']}",
    ]
    for shown_once in (parsed.secret, new["key"]):
        assert shown_once not in caplog.text


async def test_pages(http: httpx.AsyncClient) -> None:
    ids = sorted([(await create(http, tenant=tenant))["id"] for tenant in ("a", "b", "a")])
    first = (await http.get("/admin/keys", params={"limit": 2})).json()
    rest = (await http.get("/admin/keys", params={"limit": 2, "after": first["next"]})).json()
    assert [key["id"] for key in first["data"] + rest["data"]] == ids
    assert rest["next"] is None
    assert len((await http.get("/admin/keys", params={"tenant": "a", "limit": -5})).json()["data"]) == 1
    for params in ({"limit": "many"}, {"after": "' OR 1=1"}):
        assert (await http.get("/admin/keys", params=params)).status_code == 400


async def test_tenants(http: httpx.AsyncClient) -> None:
    assert (await http.get("/admin/tenants/acme")).status_code == 404
    response = await http.put("/admin/tenants/acme", json={"rpm": 5, "weight": 2})
    assert response.status_code == 200
    expected = {"object": "tenant", "name": "acme", "rpm": 5, "tpm": None, "concurrency": None, "weight": 2.0}
    assert expected.items() <= response.json().items()
    assert (await http.get("/admin/tenants/acme")).json() == response.json()
    # PUT replaces all of it.
    assert (await http.put("/admin/tenants/acme", json={"tpm": 7})).json()["rpm"] is None
    assert [tenant["name"] for tenant in (await http.get("/admin/tenants")).json()["data"]] == ["acme"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "tenant"),
        ({"tenant": None}, "tenant"),
        ({"tenant": 5}, "tenant"),
        ({"tenant": "a'; DROP TABLE api_keys; --"}, "tenant"),
        ({"tenant": "a", "secret_hash": "x"}, "secret_hash"),
        ({"tenant": "a", "id": "x"}, "id"),
        ({"tenant": "a", "role": "root"}, "role"),
        ({"tenant": "a", "rpm": 0}, "rpm"),
        ({"tenant": "a", "rpm": True}, "rpm"),
        ({"tenant": "a", "rpm": "5"}, "rpm"),
        ({"tenant": "a", "rpm": 2**63}, "rpm"),
        ({"tenant": "a", "priority": 2**31}, "priority"),
        ({"tenant": "a", "weight": 1e400}, None),
        ({"tenant": "a", "weight": -1.0}, "weight"),
        ({"tenant": "a", "models": []}, "models"),
        ({"tenant": "a", "models": ["x"] * 101}, "models"),
        ({"tenant": "a", "models": [""]}, "models[0]"),
        ({"tenant": "a", "budget": -1}, "budget"),
        ({"tenant": "a", "budget": "x" * 10_000}, "budget"),
        ({"tenant": "a", "budget": 0.1234567}, "budget"),
        ({"tenant": "a", "expires": "soon"}, "expires"),
        ({"tenant": "a", "label": "a\nb"}, "label"),
        ({"tenant": "a", "label": "from --admin-key-file"}, "label"),
    ],
)
@ON_SQLITE
async def test_bodies_that_are_refused(
    http: httpx.AsyncClient, admin: KeyAdmin, body: dict[str, Any], param: str | None
) -> None:
    response = await http.post("/admin/keys", content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert await admin.keys() == []


HOSTILE_PATHS = ["'%20OR%201=1--", "a" * 16, "%00", "a" * 2000, "%ED%A0%80", "..%2f..%2fetc"]


@pytest.mark.parametrize("hostile", HOSTILE_PATHS)
async def test_hostile_paths(http: httpx.AsyncClient, hostile: str) -> None:
    made = await create(http)
    answers = [
        await http.get(f"/admin/keys/{hostile}"),
        await http.delete(f"/admin/keys/{hostile}"),
        await http.post(f"/admin/keys/{hostile}/rotate", json={}),
        await http.get(f"/admin/tenants/{hostile}x"),
    ]
    assert {answer.status_code for answer in answers} == {404}
    assert (await http.put(f"/admin/tenants/{hostile}{'x' * 128}", json={})).status_code in (400, 404)
    assert (await http.get("/admin/keys")).json()["data"][0]["id"] == made["id"]


@ON_SQLITE
@pytest.mark.parametrize("identity", [USER, ANONYMOUS, Identity(tenant="", key_id="", method="none", role="admin")])
async def test_only_admins(
    http: httpx.AsyncClient, application: Authenticated, admin: KeyAdmin, identity: Identity
) -> None:
    made = await create(http)
    application.identity = identity
    answers = [
        await http.post("/admin/keys", json={"tenant": "acme", "role": "admin"}),
        await http.get("/admin/keys"),
        await http.get(f"/admin/keys/{made['id']}"),
        await http.delete(f"/admin/keys/{made['id']}"),
        await http.post(f"/admin/keys/{made['id']}/rotate", json={}),
        await http.get("/admin/tenants"),
        await http.get("/admin/tenants/acme"),
        await http.put("/admin/tenants/acme", json={"rpm": 1}),
    ]
    assert {(answer.status_code, answer.json()["error"]["code"]) for answer in answers} == {(403, "permission_denied")}
    (left,) = await admin.keys()
    assert left.revoked_at is None
    assert (await admin.tenant("acme")).settings.rpm is None


async def test_a_jwt_admin_is_an_admin(http: httpx.AsyncClient, application: Authenticated) -> None:
    application.identity = Identity(tenant="ops", key_id="jwt:eve\nforged line", method="jwt", role="admin")
    assert (await create(http))["tenant"] == "acme"


@ON_SQLITE
async def test_the_openapi_document_knows_the_bodies(application: Authenticated) -> None:
    document = describe(cast(FastAPI, application.app))
    body = document["paths"]["/admin/keys"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/CreateKeyBody"}
    for path in ("/admin/keys/{key_id}", "/admin/keys/{key_id}/rotate", "/admin/tenants/{name}", "/admin/tenants"):
        for operation in document["paths"][path].values():
            schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
            assert schema["$ref"].rpartition("/")[2] in document["components"]["schemas"]


async def test_a_database_that_is_away_is_503() -> None:
    app = FastAPI()
    add_error_handlers(app)
    away = Database("postgresql://u:hidden@127.0.0.1:1/db", timeout_s=1)
    admin_keys.add_routes(app, cast(Gateway, None), KeyAdmin(away))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(Authenticated(app)), base_url="http://test") as client:
        response = await client.get("/admin/keys")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unavailable")
    assert "127.0.0.1" not in response.text
    await away.close()
