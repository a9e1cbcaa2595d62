"""Limits of a tenant hold for its tokens as for its keys."""

from __future__ import annotations

import asyncio
from pathlib import Path

import jwt
import pytest

from penstock.core.config import ServerConfig
from penstock.core.errors import NotFoundError, StoreUnavailableError
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.accounts.admin import KeyAdmin, TenantInfo
from penstock.serving.gateway.accounts.database import Database
from penstock.serving.gateway.accounts.migrate import prepare
from penstock.serving.gateway.accounts.rules import TenantSettings
from penstock.serving.gateway.identity import NO_LIMITS, Identity, RateLimits
from penstock.serving.gateway.security import tenants
from penstock.serving.gateway.security.build import add_security
from penstock.serving.gateway.security.tenants import FRESH_S, TenantTerms
from penstock.telemetry.recorder import Recorder
from tests.serving.gateway.security.asgi_client import Echo, ask, bearer

ACME = Identity(tenant="acme", key_id="jwt:alice", method="jwt", key_limits=RateLimits(3))


class Source:
    """Tenants in memory, with a database that can be away."""

    def __init__(self) -> None:
        self.rpm: int | None = 10
        self.away = False
        self.failure: Exception | None = None
        self.asked = 0
        self.now = 0.0
        self.terms = TenantTerms(self, clock=lambda: self.now)

    async def tenant(self, name: str) -> TenantInfo:
        self.asked += 1
        await asyncio.sleep(0)
        if self.away:
            raise StoreUnavailableError("away")
        if self.failure is not None:
            raise self.failure
        if name != "acme":
            raise NotFoundError("no such tenant")
        return TenantInfo(name, TenantSettings(rpm=self.rpm, weight=2.0), 0.0)

    async def rpm_of_acme(self) -> int | None:
        return (await self.terms.apply(ACME)).tenant_limits.requests_per_minute


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_many_requests_ask_once_and_a_change_is_seen() -> None:
    source = Source()
    found = await asyncio.gather(*(source.terms.apply(ACME) for _ in range(50)))
    assert source.asked == 1
    assert {(each.tenant_limits, each.weight, each.key_limits) for each in found} == {
        (RateLimits(10), 2.0, RateLimits(3))
    }
    source.rpm = 20
    assert await source.rpm_of_acme() == 10
    source.now += FRESH_S
    # Nobody waits for the database: this request still goes by what is known.
    assert await source.rpm_of_acme() == 10
    await settle()
    assert await source.rpm_of_acme() == 20
    assert source.asked == 2


async def test_while_the_database_is_away() -> None:
    source = Source()
    source.away = True
    with pytest.raises(StoreUnavailableError):
        await source.rpm_of_acme()
    source.away = False
    assert await source.rpm_of_acme() == 10
    source.away = True
    for _ in range(10):
        source.now += 100
        assert await source.rpm_of_acme() == 10
        await settle()
        # Not once per request.
        assert await source.rpm_of_acme() == 10
    assert source.asked == 12


async def test_a_fault_behind_a_request_is_logged_and_what_is_known_stays(caplog: pytest.LogCaptureFixture) -> None:
    source = Source()
    source.failure = RuntimeError("a fault of ours")
    with pytest.raises(RuntimeError):
        await source.rpm_of_acme()
    source.failure = None
    assert await source.rpm_of_acme() == 10
    source.failure = RuntimeError("a fault of ours")
    source.now += FRESH_S
    assert await source.rpm_of_acme() == 10
    await settle()
    assert "failed unexpectedly" in caplog.text
    assert await source.rpm_of_acme() == 10


async def test_tenants_without_an_account_have_no_limits_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants, "MAX_TENANTS", 5)
    source = Source()
    for number in range(20):
        identity = Identity(tenant=f"t{number}", key_id="jwt:x", method="jwt")
        assert await source.terms.apply(identity) == identity
        assert identity.tenant_limits == NO_LIMITS
    assert source.terms.remembered == 5


async def test_a_token_gets_the_limits_of_its_tenant_in_the_database(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s" * 32)
    database = Database(f"sqlite:///{tmp_path}/accounts.db")
    await prepare(database)
    admin = KeyAdmin(database)
    await admin.set_tenant("acme", TenantSettings(rpm=7, tpm=500), actor="test")
    config = GatewayConfig(auth="jwt", jwt_algorithm="HS256", jwt_secret_file=str(secret))
    echo = Echo()
    app = add_security(echo, config, ServerConfig(), None, Recorder(), tenants=admin)
    token = jwt.encode({"tenant": "acme", "sub": "alice", "exp": 2**40, "limits": {"rpm": 2}}, "s" * 32, "HS256")
    assert (await ask(app, "/v1/models", bearer(token))).status == 200
    assert echo.identity.tenant_limits == RateLimits(7, 500)
    assert echo.identity.key_limits == RateLimits(2)
    await database.close()
