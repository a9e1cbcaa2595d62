"""Keys: their format, what is kept of them, and what happens to them from creation to the end."""

from __future__ import annotations

import asyncio
import datetime
import hmac
import logging
from pathlib import Path

import pytest
from sqlalchemy import insert, select, text

from penstock.core.errors import ConfigError, InvalidRequestError, NotFoundError
from penstock.serving.gateway.accounts import keys as keys_module
from penstock.serving.gateway.accounts.admin import FILE_LABEL, KeyAdmin
from penstock.serving.gateway.accounts.admin_key_file import ensure_admin_key
from penstock.serving.gateway.accounts.database import Database
from penstock.serving.gateway.accounts.interface import KeyEntry
from penstock.serving.gateway.accounts.keys import PresentedKey, hash_secret, new_key, parse_key, verify
from penstock.serving.gateway.accounts.rules import (
    KeySettings,
    TenantSettings,
    parse_budget,
    parse_duration,
    parse_expiry,
    show_money,
)
from penstock.serving.gateway.accounts.tables import TenantRow, UsageDailyRow
from penstock.serving.gateway.identity import ANONYMOUS

DAY = 86400.0
START = 1_800_000_000.0
# Where the database plays no part.
ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admin(database: Database, clock: Clock) -> KeyAdmin:
    return KeyAdmin(database, clock=clock)


def entry(secret: str, *, usable: bool = True) -> KeyEntry:
    return KeyEntry(
        key_id="a" * 16, secret_hash=hash_secret(secret), usable=usable, expires_at=None, identity=ANONYMOUS
    )


# ---- format ----


def test_a_key_is_an_id_and_a_secret_of_256_bits() -> None:
    key = new_key()
    parsed = parse_key(key.token)
    assert parsed is not None
    assert parsed.key_id == key.key_id
    assert hash_secret(parsed.secret) == key.secret_hash
    assert len(key.token) == 64
    assert key.token.startswith("psk_")
    assert key.token not in repr(key)
    assert parsed.secret not in repr(parsed)
    assert len({new_key().token for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "token",
    [
        "",
        "psk_",
        "psk_" + "a" * 16 + "_" + "x" * 42,
        "psk_" + "a" * 16 + "_" + "x" * 44,
        "psk_" + "A" * 16 + "_" + "x" * 43,
        "psk_" + "a" * 15 + "'_" + "x" * 43,
        "psk_" + "a" * 16 + "_" + "x" * 42 + "é",
        "psk_" + "a" * 16 + "_" + "x" * 43 + "\n",
        "x" * 31,
        "x" * 513,
        "x" * 16 + " " + "x" * 16,
        "x" * 40 + "\0",
        "ſ" * 40,
    ],
)
def test_what_is_no_key(token: str) -> None:
    assert parse_key(token) is None


def test_a_foreign_secret_has_a_stable_id_that_tells_nothing_of_its_hash() -> None:
    secret = "correct-horse-battery-staple-0123"
    parsed = parse_key(secret)
    assert parsed is not None
    assert parsed == parse_key(secret)
    assert parsed.secret == secret
    assert keys_module.is_key_id(parsed.key_id)
    assert parsed.key_id not in hash_secret(secret).hex()


def test_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    presented = PresentedKey("a" * 16, "right")
    assert verify(presented, entry("right"))
    assert not verify(presented, entry("wrong"))
    assert not verify(presented, entry("right", usable=False))
    assert not verify(presented, None)
    # The same work in every case: one hash of the secret and one comparison of 32 bytes.
    assert [(len(a), len(b)) for a, b in compared] == [(32, 32)] * 4
    assert {a for a, _ in compared} == {hash_secret("right")}


# ---- what people write ----


def test_money_is_exact() -> None:
    assert parse_budget("12.50") == 12_500_000
    assert parse_budget("0.000001") == 1
    assert [show_money(micros) for micros in (0, 1, 12_500_000, 10**15)] == [
        "0.00",
        "0.000001",
        "12.50",
        "1000000000.00",
    ]
    for wrong in ("", "x", "-1", "NaN", "Infinity", "0.0000001", "1e999999999", "9" * 30, "1000000001"):
        with pytest.raises(InvalidRequestError, match="budget"):
            parse_budget(wrong)


def test_times() -> None:
    assert [parse_duration(text, "grace") for text in ("0s", "10m", "1.5h", "30d", "2w")] == [
        0,
        600,
        5400,
        30 * DAY,
        14 * DAY,
    ]
    assert parse_expiry("30d", 100.0) == 100 + 30 * DAY
    assert parse_expiry("2027-01-01", 0) == parse_expiry("2027-01-01T01:00+01:00", 0) == 1798761600
    for wrong in ("", "10", "-5m", "m", "1" * 20 + "d", "2027-13-01", "tomorrow", "9999-99-99"):
        with pytest.raises(InvalidRequestError, match="expires"):
            parse_expiry(wrong, 0)


# ---- life of a key ----


async def test_create_and_show(admin: KeyAdmin) -> None:
    settings = KeySettings(
        label="CI ünïcode",
        models=("small", "big"),
        rpm=10,
        tpm=2000,
        concurrency=3,
        priority=-2,
        weight=1.5,
        budget_micros=12_500_000,
        expires_at=START + DAY,
    )
    created = await admin.create("acme", "admin", settings, actor="cli")
    shown = await admin.show(created.info.id)
    assert shown == created.info
    assert shown.settings == settings
    assert (shown.tenant, shown.role, shown.created_at) == ("acme", "admin", START)
    assert shown.state(START) == "active"
    assert shown.state(START + DAY) == "expired"
    assert (await admin.tenant("acme")).settings == TenantSettings()


async def test_no_secret_is_stored_or_logged(
    admin: KeyAdmin, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    created = await admin.create("acme", actor="cli")
    rotated = await admin.rotate(created.info.id, actor="cli")
    await admin.revoke(rotated.info.id, actor="cli")
    async with database.read() as connection:
        rows = str((await connection.execute(text("SELECT * FROM api_keys"))).all())
    for token in (created.token, rotated.token):
        parsed = parse_key(token)
        assert parsed is not None
        for secret in (token, parsed.secret):
            assert secret not in rows + caplog.text + repr(created) + repr(rotated)
    actions = [record.getMessage() for record in caplog.records if record.name.endswith("accounts.admin")]
    assert [message.split(" (")[0] for message in actions] == [
        f"cli created key {created.info.id}",
        f"cli rotated key {created.info.id}",
        f"cli revoked key {rotated.info.id}",
    ]


@ON_SQLITE
@pytest.mark.parametrize(
    ("settings", "param"),
    [
        (KeySettings(rpm=0), "rpm"),
        (KeySettings(tpm=-1), "tpm"),
        (KeySettings(concurrency=10**13), "concurrency"),
        (KeySettings(label="a\nb"), "label"),
        (KeySettings(label="x" * 201), "label"),
        (KeySettings(label=FILE_LABEL), "label"),
        (KeySettings(models=()), "models"),
        (KeySettings(models=("",)), "models"),
        (KeySettings(models=("x",) * 101), "models"),
        (KeySettings(priority=2**31), "priority"),
        (KeySettings(weight=0.0), "weight"),
        (KeySettings(weight=float("nan")), "weight"),
        (KeySettings(budget_micros=-1), "budget"),
        (KeySettings(expires_at=START), "expires"),
        (KeySettings(expires_at=float("inf")), "expires"),
    ],
)
async def test_settings_that_are_refused(admin: KeyAdmin, settings: KeySettings, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await admin.create("acme", settings=settings, actor="cli")
    assert caught.value.param == param
    assert await admin.keys() == []


HOSTILE = [
    "'; DROP TABLE api_keys; --",
    "' OR '1'='1",
    "a\0b",
    "x" * 10_000,
    "",
    "../../etc/passwd",
    "\ud800",
    "%",
    "_" * 16,
]


@pytest.mark.parametrize("hostile", HOSTILE)
async def test_hostile_names_and_ids(admin: KeyAdmin, database: Database, hostile: str) -> None:
    victim = (await admin.create("acme", actor="cli")).info
    for ask in (admin.show(hostile), admin.revoke(hostile, actor="cli"), admin.rotate(hostile, actor="cli")):
        with pytest.raises(NotFoundError) as caught:
            await ask
        assert caught.value.message == "There is no such key."
    with pytest.raises(InvalidRequestError):
        await admin.create(hostile, actor="cli")
    with pytest.raises(InvalidRequestError):
        await admin.set_tenant(hostile, TenantSettings(rpm=1), actor="cli")
    with pytest.raises(NotFoundError):
        await admin.tenant(hostile)
    assert await admin.keys(hostile) == []
    if hostile:
        with pytest.raises(InvalidRequestError):
            await admin.keys(after=hostile)
    assert [info.id for info in await admin.keys()] == [victim.id]
    assert [tenant.name for tenant in await admin.tenants()] == ["acme"]


async def test_lists_are_pages_in_the_order_of_ids(admin: KeyAdmin) -> None:
    made = [(await admin.create(tenant, actor="cli")).info for tenant in ("a", "b", "a", "b", "a")]
    ids = sorted(info.id for info in made)
    first = await admin.keys(limit=3)
    rest = await admin.keys(after=first[-1].id, limit=3)
    assert [info.id for info in first + rest] == ids
    assert {info.tenant for info in await admin.keys("a")} == {"a"}
    assert len(await admin.keys("a")) == 3


async def test_revoke_is_for_good(admin: KeyAdmin, clock: Clock) -> None:
    key_id = (await admin.create("acme", actor="cli")).info.id
    assert await admin.any_usable()
    assert (await admin.revoke(key_id, actor="cli")).revoked_at == START
    clock.now += 5
    assert (await admin.revoke(key_id, actor="cli")).revoked_at == START
    assert not await admin.any_usable()
    with pytest.raises(InvalidRequestError, match="is revoked"):
        await admin.rotate(key_id, actor="cli")


async def test_rotation(admin: KeyAdmin, clock: Clock) -> None:
    settings = KeySettings(rpm=7, models=("small",), label="CI", expires_at=START + DAY)
    old = await admin.create("acme", "admin", settings, actor="cli")
    clock.now += 60
    new = await admin.rotate(old.info.id, actor="cli", grace_s=600)
    assert new.token != old.token
    assert (new.info.settings, new.info.role, new.info.tenant) == (settings, "admin", "acme")
    assert new.info.created_at == START + 60
    after = await admin.show(old.info.id)
    assert after.replaced_by == new.info.id
    assert after.revoked_at == START + 660
    assert (after.state(START + 659), after.state(START + 660)) == ("rotated", "revoked")
    with pytest.raises(InvalidRequestError, match="is rotated"):
        await admin.rotate(old.info.id, actor="cli")
    # The grace time can be ended early.
    assert (await admin.revoke(old.info.id, actor="cli")).revoked_at == clock.now
    for grace_s in (-1.0, 31 * DAY, float("nan")):
        with pytest.raises(InvalidRequestError, match="grace"):
            await admin.rotate(new.info.id, actor="cli", grace_s=grace_s)


async def test_two_rotations_at_once_make_one_key(admin: KeyAdmin) -> None:
    key_id = (await admin.create("acme", actor="cli")).info.id
    results = await asyncio.gather(*(admin.rotate(key_id, actor="cli") for _ in range(4)), return_exceptions=True)
    assert sum(isinstance(result, InvalidRequestError) for result in results) == 3
    assert len(await admin.keys()) == 2


async def test_money_spent_is_that_of_the_chain(admin: KeyAdmin, database: Database) -> None:
    first = (await admin.create("acme", actor="cli")).info.id
    other = (await admin.create("acme", actor="cli")).info.id
    second = (await admin.rotate(first, actor="cli")).info.id
    third = (await admin.rotate(second, actor="cli")).info.id
    await spend(database, {first: 100, second: 20, third: 3, other: 7000})
    spent = {info.id: info.spent_micros for info in await admin.keys()}
    assert spent == {first: 123, second: 123, third: 123, other: 7000}


async def spend(database: Database, costs: dict[str, int]) -> None:
    """Usage of two models and days each, as the ledger writes it."""
    async with database.write() as connection:
        for key_id, cost in costs.items():
            for day, part in ((1, cost - cost // 2), (2, cost // 2)):
                await connection.execute(
                    insert(UsageDailyRow).values(
                        key_id=key_id, tenant="acme", model=f"m{day}", day=datetime.date(2026, 1, day), requests=1, cache_hits=0,
                        prompt_tokens=1, cached_tokens=0, output_tokens=1, cost_micros=part,
                    )
                )  # fmt: skip


async def test_tenants(admin: KeyAdmin, database: Database) -> None:
    set_to = TenantSettings(rpm=100, tpm=5000, concurrency=10, weight=2.5)
    assert (await admin.set_tenant("acme", set_to, actor="cli")).settings == set_to
    assert (await admin.set_tenant("acme", TenantSettings(rpm=1), actor="cli")).settings == TenantSettings(rpm=1)
    await admin.create("acme", actor="cli")
    assert (await admin.tenant("acme")).settings == TenantSettings(rpm=1)
    async with database.read() as connection:
        assert len((await connection.execute(select(TenantRow.name))).all()) == 1


# ---- the admin key file ----


async def test_admin_key_file(admin: KeyAdmin, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "secret"
    foreign, ours = "a-secret-of-an-operator-0123456789", new_key()
    file.write_text(foreign + "\n")
    first = await ensure_admin_key(admin, str(file))
    assert first == await ensure_admin_key(admin, str(file))
    parsed = parse_key(foreign)
    assert parsed is not None
    assert parsed.key_id == first
    assert await admin.has_secret(first, hash_secret(foreign))
    info = await admin.show(first)
    assert (info.role, info.tenant, info.state(START)) == ("admin", "admin", "active")

    file.write_text(ours.token)
    assert await ensure_admin_key(admin, str(file)) == ours.key_id
    assert (await admin.show(first)).state(START) == "revoked"
    assert (await admin.show(ours.key_id)).state(START) == "active"

    # Revoked by an admin: a restart does not bring it back.
    await admin.revoke(ours.key_id, actor="cli")
    await ensure_admin_key(admin, str(file))
    assert (await admin.show(ours.key_id)).state(START) == "revoked"
    assert "put a new secret into the file" in caplog.text
    assert foreign not in caplog.text
    assert ours.token not in caplog.text


async def test_admin_key_file_in_several_processes_at_once(admin: KeyAdmin, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("x" * 32)
    ids = await asyncio.gather(*(ensure_admin_key(admin, str(file)) for _ in range(5)))
    assert len(set(ids)) == 1
    assert len(await admin.keys()) == 1


async def test_a_rotated_file_key_outlives_a_restart(admin: KeyAdmin, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("x" * 32)
    new = await admin.rotate(await ensure_admin_key(admin, str(file)), actor="cli")
    await ensure_admin_key(admin, str(file))
    assert (await admin.show(new.info.id)).state(START) == "active"


@ON_SQLITE
@pytest.mark.parametrize(
    "content", [b"short", b"", b"x" * 600, b"two words, long enough to be a secret", b"psk_" + b"x" * 40, b"\xff" * 40]
)
async def test_admin_key_files_that_are_refused(admin: KeyAdmin, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "secret"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        await ensure_admin_key(admin, str(file))
    assert str(file) in str(caught.value)
    assert not content or content.decode("latin-1") not in str(caught.value)
    assert await admin.keys() == []


async def test_a_file_cannot_take_over_another_key(admin: KeyAdmin, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    user = await admin.create("acme", actor="cli")
    file.write_text(user.token)
    with pytest.raises(ConfigError, match="is no admin key"):
        await ensure_admin_key(admin, str(file))
    file.write_text(user.token[:-1] + ("x" if user.token[-1] != "x" else "y"))
    with pytest.raises(ConfigError, match="with another secret"):
        await ensure_admin_key(admin, str(file))
    with pytest.raises(ConfigError, match="cannot read"):
        await ensure_admin_key(admin, str(tmp_path / "nothing"))
