"""Authentication over the real directory of keys in SQLite: the first admin key from a file, revocation, an attempt at injection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from penstock.core.config import ServerConfig
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.accounts.admin import KeyAdmin
from penstock.serving.gateway.accounts.admin_key_file import ensure_admin_key
from penstock.serving.gateway.accounts.database import Database
from penstock.serving.gateway.accounts.directory import FRESH_S, AccountDirectory
from penstock.serving.gateway.accounts.migrate import prepare
from penstock.serving.gateway.accounts.rules import KeySettings
from penstock.serving.gateway.security.build import add_security
from penstock.telemetry.recorder import Recorder
from tests.serving.gateway.security.asgi_client import Answer, Echo, ask, bearer


class House:
    """A server with accounts, and a clock for what the directory remembers."""

    def __init__(self, database: Database) -> None:
        self.now = 0.0
        self.echo = Echo()
        self.admin = KeyAdmin(database)
        self.directory = AccountDirectory(database, Recorder(), clock=lambda: self.now)
        server = ServerConfig(host="0.0.0.0")  # noqa: S104
        self.app = add_security(self.echo, GatewayConfig(), server, self.directory, Recorder())

    async def get(self, path: str, token: str) -> Answer:
        return await ask(self.app, path, bearer(token))


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    database = Database(f"sqlite:///{tmp_path}/accounts.db")
    await prepare(database)
    house = House(database)
    yield house
    await house.directory.close()
    await database.close()


async def test_a_key_from_its_making_to_its_revocation(house: House) -> None:
    created = await house.admin.create("acme", "user", KeySettings(rpm=5, priority=3), actor="test")
    assert (await house.get("/v1/models", created.token)).status == 200
    identity = house.echo.identity
    assert (identity.tenant, identity.role, identity.priority) == ("acme", "user", 3)
    assert identity.key_limits.requests_per_minute == 5
    await house.admin.revoke(created.info.id, actor="test")
    house.now += FRESH_S
    assert (await house.get("/v1/models", created.token)).status == 401


async def test_the_first_admin_key_comes_from_a_file(house: House, tmp_path: Path) -> None:
    user = await house.admin.create("acme", "user", KeySettings(), actor="test")
    assert (await house.get("/admin/keys", user.token)).status == 404
    path = tmp_path / "secret"
    path.write_text("a.container's+secret/of=32characters.or.more\n")
    await ensure_admin_key(house.admin, str(path))
    house.now += FRESH_S
    token = path.read_text().strip()
    assert (await house.get("/admin/keys", token)).status == 200
    assert house.echo.identity.role == "admin"
    assert (await house.get("/admin/keys", user.token)).status == 403
    assert (await house.get("/admin/keys", token + "x")).status == 401


async def test_a_credential_never_becomes_sql(house: House) -> None:
    created = await house.admin.create("acme", "admin", KeySettings(), actor="test")
    for token in (
        "psk_aaaaaaaaaaaaaaaa_" + "'" * 43,
        "psk_'OR'1'='1'--aaaa_" + "a" * 43,
        "'OR(1=1)--" + "a" * 40,
        "psk_%%%%%%%%%%%%%%%%_" + "a" * 43,
    ):
        assert (await house.get("/v1/models", token)).status == 401
    assert (await house.get("/v1/models", created.token)).status == 200
