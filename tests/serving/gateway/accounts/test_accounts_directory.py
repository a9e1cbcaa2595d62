"""The key directory: at most a second behind the database, one query for many, bounded memory, and a stated answer while it is away."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from penstock.core.errors import StoreUnavailableError
from penstock.serving.gateway.accounts import directory as directory_module
from penstock.serving.gateway.accounts import migrate
from penstock.serving.gateway.accounts.admin import KeyAdmin
from penstock.serving.gateway.accounts.database import Database
from penstock.serving.gateway.accounts.directory import FRESH_S, REFRESH_AFTER_S, STALE_S, AccountDirectory
from penstock.serving.gateway.accounts.keys import hash_secret, new_key, parse_key, verify
from penstock.serving.gateway.accounts.rules import KeySettings, TenantSettings
from penstock.serving.gateway.accounts.tables import UsageDailyRow
from penstock.serving.gateway.identity import Identity, RateLimits
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder
from tests.services import PostgresServer

START = 1_800_000_000.0


class Clock:
    """Both clocks of a directory."""

    def __init__(self) -> None:
        self.passed = 0.0

    def monotonic(self) -> float:
        return 5.0 + self.passed

    def time(self) -> float:
        return START + self.passed


class WatchedDatabase(Database):
    """Counts what is read, and does as it is told: `failure` is raised, `hang` lets readers wait."""

    reads = 0
    failure: Exception | None = None
    hang: asyncio.Event | None = None

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        self.reads += 1
        if self.hang is not None:
            await self.hang.wait()
        if self.failure is not None:
            raise self.failure
        async with super().read() as connection:
            yield connection


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[WatchedDatabase]:
    database = WatchedDatabase(database_url)
    await migrate.prepare(database)
    database.reads = 0
    yield database
    await database.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def admin(database: WatchedDatabase, clock: Clock) -> AsyncIterator[KeyAdmin]:
    """Over connections of its own: another process."""
    own = Database(database.url.render_as_string(hide_password=False))
    yield KeyAdmin(own, clock=clock.time)
    await own.close()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


MakeDirectory = Callable[..., AccountDirectory]


@pytest.fixture
async def make_directory(
    database: WatchedDatabase, clock: Clock, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[MakeDirectory]:
    monkeypatch.setattr(directory_module, "PROBE_INTERVAL_S", 0.01)
    made: list[AccountDirectory] = []

    def make(**settings: float) -> AccountDirectory:
        made.append(
            AccountDirectory(database, recorder, clock=clock.monotonic, wall_clock=clock.time, **settings)  # type: ignore[arg-type]
        )
        return made[-1]

    yield make
    for directory in made:
        await directory.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - nothing to wait on from outside
            await asyncio.sleep(0.005)


async def usable(directory: AccountDirectory, key_id: str) -> bool | None:
    entry = await directory.find(key_id)
    return None if entry is None else entry.usable


async def spend(database: Database, key_id: str, micros: int, model: str = "m") -> None:
    async with database.write() as connection:
        await connection.execute(
            insert(UsageDailyRow).values(
                key_id=key_id,
                tenant="acme",
                model=model,
                day=datetime.date(2026, 1, 1),
                requests=1,
                cache_hits=0,
                prompt_tokens=1,
                cached_tokens=0,
                output_tokens=1,
                cost_micros=micros,
            )
        )


async def test_what_a_key_stands_for(admin: KeyAdmin, make_directory: MakeDirectory) -> None:
    await admin.set_tenant("acme", TenantSettings(rpm=100, tpm=None, concurrency=9, weight=3.0), actor="cli")
    settings = KeySettings(models=("small",), rpm=10, tpm=500, priority=4, expires_at=START + 100)
    created = await admin.create("acme", "admin", settings, actor="cli")
    plain = (await admin.create("other", settings=KeySettings(weight=0.5), actor="cli")).info.id
    directory = make_directory()
    entry = await directory.find(created.info.id)
    assert entry is not None
    assert entry.identity == Identity(
        tenant="acme",
        key_id=created.info.id,
        method="key",
        role="admin",
        models=frozenset({"small"}),
        key_limits=RateLimits(10, 500, None),
        tenant_limits=RateLimits(100, None, 9),
        priority=4,
        weight=3.0,
    )
    assert (entry.usable, entry.expires_at) == (True, START + 100)
    presented = parse_key(created.token)
    assert presented is not None
    assert verify(presented, entry)
    assert entry.secret_hash == hash_secret(presented.secret)
    other = await directory.find(plain)
    assert other is not None
    assert other.identity == Identity(tenant="other", key_id=plain, method="key", weight=0.5)


async def test_one_query_a_second_and_none_in_the_way(
    admin: KeyAdmin, database: WatchedDatabase, make_directory: MakeDirectory, clock: Clock
) -> None:
    key_id = (await admin.create("acme", actor="cli")).info.id
    directory = make_directory()
    assert await usable(directory, key_id)
    clock.passed = REFRESH_AFTER_S - 0.01
    assert await usable(directory, key_id)
    assert database.reads == 1
    # Half a second old: answered at once although the database hangs, and asked behind it, once.
    clock.passed = REFRESH_AFTER_S
    database.hang = asyncio.Event()
    for _ in range(10):
        assert await usable(directory, key_id)
    await until(lambda: database.reads == 2)
    database.hang.set()
    await asyncio.sleep(0.05)
    clock.passed += REFRESH_AFTER_S
    assert await usable(directory, key_id)
    await until(lambda: database.reads == 3)


async def test_two_directories_see_a_revocation(admin: KeyAdmin, make_directory: MakeDirectory, clock: Clock) -> None:
    key_id = (await admin.create("acme", actor="cli")).info.id
    directories = [make_directory(), make_directory()]
    assert [await usable(directory, key_id) for directory in directories] == [True, True]
    await admin.revoke(key_id, actor="cli")
    clock.passed = FRESH_S
    assert [await usable(directory, key_id) for directory in directories] == [False, False]


async def test_a_new_key_is_found_within_a_second(admin: KeyAdmin, make_directory: MakeDirectory, clock: Clock) -> None:
    directory = make_directory()
    key = new_key()
    assert await usable(directory, key.key_id) is None
    assert not await directory.any_admin()
    await admin.create("acme", "admin", actor="cli", key=key)
    clock.passed = FRESH_S
    assert await usable(directory, key.key_id)
    assert await directory.any_admin()
    assert directory.remembered == (1, 0)


async def test_expiry_and_grace_end_without_a_query(
    admin: KeyAdmin, database: WatchedDatabase, make_directory: MakeDirectory, clock: Clock
) -> None:
    expiring = (await admin.create("acme", settings=KeySettings(expires_at=START + 0.2), actor="cli")).info.id
    rotated = (await admin.create("acme", actor="cli")).info.id
    await admin.rotate(rotated, actor="cli", grace_s=0.3)
    directory = make_directory()
    found = []
    for clock.passed in (0.0, 0.2, 0.3):
        found.append((await usable(directory, expiring), await usable(directory, rotated)))
    assert found == [(True, True), (False, True), (False, False)]
    assert database.reads == 2


async def test_concurrent_look_ups_share_a_query(
    admin: KeyAdmin, database: WatchedDatabase, make_directory: MakeDirectory
) -> None:
    ids = [(await admin.create("acme", actor="cli")).info.id for _ in range(5)]
    directory = make_directory()
    database.hang = asyncio.Event()
    tasks = [asyncio.create_task(usable(directory, key_id)) for key_id in ids * 20]
    # One that gives up does not take the others along.
    await until(lambda: database.reads == 1)
    tasks[0].cancel()
    late = asyncio.create_task(usable(directory, new_key().key_id))
    database.hang.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [True] * 99
    assert await late is None
    assert database.reads == 2


async def test_memory_is_bounded_and_made_up_ids_push_no_key_out(
    admin: KeyAdmin, database: WatchedDatabase, make_directory: MakeDirectory
) -> None:
    ids = [(await admin.create("acme", actor="cli")).info.id for _ in range(4)]
    directory = make_directory(known_keys=3, unknown_keys=50)
    assert await asyncio.gather(*(usable(directory, key_id) for key_id in ids)) == [True] * 4
    reads = database.reads
    await asyncio.gather(*(directory.find(new_key().key_id) for _ in range(1200)))
    # Few long queries, not many.
    assert database.reads - reads <= 4
    assert directory.remembered == (3, 50)
    reads = database.reads
    assert await usable(directory, ids[-1])
    assert database.reads == reads


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    "hostile", ["", "'; DROP TABLE api_keys; --", "a" * 15, "A" * 16, "a\0" * 8, "é" * 16, "x" * 10_000]
)
async def test_what_cannot_be_an_id_is_never_asked(
    database: WatchedDatabase, make_directory: MakeDirectory, hostile: str
) -> None:
    assert await make_directory().find(hostile) is None
    assert database.reads == 0


async def test_budget(admin: KeyAdmin, database: WatchedDatabase, make_directory: MakeDirectory, clock: Clock) -> None:
    directory = make_directory()
    settings = KeySettings(budget_micros=1000)
    first = (await admin.create("acme", settings=settings, actor="cli")).info.id
    free = (await admin.create("acme", actor="cli")).info.id
    nothing = (await admin.create("acme", settings=KeySettings(budget_micros=0), actor="cli")).info.id

    async def over(key_id: str) -> bool:
        clock.passed += FRESH_S
        entry = await directory.find(key_id)
        assert entry is not None
        assert entry.usable
        return entry.identity.over_budget

    assert (await over(first), await over(free), await over(nothing)) == (False, False, True)
    await spend(database, first, 600)
    await spend(database, free, 10**15)
    assert (await over(first), await over(free)) == (False, False)
    # A rotation is no new budget.
    second = (await admin.rotate(first, actor="cli")).info.id
    await spend(database, second, 399)
    assert not await over(second)
    await spend(database, first, 1, model="another")
    assert await over(second)


# ---- while the database is away ----


async def test_away_and_back(
    admin: KeyAdmin,
    database: WatchedDatabase,
    make_directory: MakeDirectory,
    clock: Clock,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    key_id = (await admin.create("acme", "admin", actor="cli")).info.id
    gone = (await admin.create("acme", actor="cli")).info.id
    await admin.revoke(gone, actor="cli")
    directory = make_directory()
    assert (await usable(directory, key_id), await usable(directory, gone)) == (True, False)
    assert await directory.any_admin()

    database.failure = StoreUnavailableError("away")
    clock.passed = STALE_S - 0.01
    for _ in range(50):
        assert await usable(directory, key_id)
        assert await usable(directory, gone) is False
        with pytest.raises(StoreUnavailableError):
            await directory.find(new_key().key_id)
    assert await directory.any_admin()
    assert recorder.value(metrics.STORE_UP, "database") == 0
    assert recorder.value(metrics.STORE_ERRORS, "database", "keys") >= 50
    clock.passed = STALE_S
    with pytest.raises(StoreUnavailableError):
        await directory.find(key_id)

    database.failure = None
    await until(lambda: recorder.value(metrics.STORE_UP, "database") == 1)
    assert await usable(directory, key_id)
    assert await usable(directory, gone) is False
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("accounts.directory")]
    assert len(lines) == 2
    assert "is away" in lines[0]
    assert "is back" in lines[1]


async def test_nothing_known_means_no_admin_routes(database: WatchedDatabase, make_directory: MakeDirectory) -> None:
    database.failure = StoreUnavailableError("away")
    directory = make_directory()
    assert await directory.any_admin() is False


async def test_a_hanging_database_costs_its_time_out_once(
    admin: KeyAdmin, database: WatchedDatabase, make_directory: MakeDirectory, clock: Clock
) -> None:
    key_id = (await admin.create("acme", actor="cli")).info.id
    directory = make_directory(lookup_timeout_s=0.2)
    assert await usable(directory, key_id)
    clock.passed = FRESH_S
    database.hang = asyncio.Event()
    waited = asyncio.get_running_loop().time()
    assert await asyncio.gather(*(usable(directory, key_id) for _ in range(20))) == [True] * 20
    reads = database.reads
    assert all([await usable(directory, key_id) for _ in range(20)])
    waited = asyncio.get_running_loop().time() - waited
    assert waited < 20 * 0.2
    assert database.reads <= reads + 2
    database.hang.set()


async def test_a_fault_of_ours_reaches_those_who_wait_and_no_one_else(
    admin: KeyAdmin, database: WatchedDatabase, make_directory: MakeDirectory, recorder: Recorder
) -> None:
    key_id = (await admin.create("acme", actor="cli")).info.id
    directory = make_directory()
    database.failure = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        await directory.find(key_id)
    database.failure = None
    assert await usable(directory, key_id)
    assert recorder.value(metrics.STORE_UP, "database") == 1


async def test_close_ends_what_runs(database: WatchedDatabase, make_directory: MakeDirectory) -> None:
    directory = make_directory()
    database.hang = asyncio.Event()
    waiting = asyncio.create_task(directory.find(new_key().key_id))
    await until(lambda: database.reads == 1)
    await directory.close()
    with pytest.raises(StoreUnavailableError):
        await waiting
    await directory.close()


@pytest.mark.postgresql
async def test_a_real_postgresql_that_goes_and_hangs(
    postgres_server: PostgresServer, recorder: Recorder, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_module, "PROBE_INTERVAL_S", 0.05)
    database = Database(postgres_server.fresh(), timeout_s=1.0)
    await migrate.prepare(database)
    key_id = (await KeyAdmin(database, clock=clock.time).create("acme", actor="cli")).info.id
    directory = AccountDirectory(database, recorder, clock=clock.monotonic, wall_clock=clock.time, lookup_timeout_s=1.0)
    assert await usable(directory, key_id)
    for leave, come_back in (
        (postgres_server.stop, postgres_server.start),
        (postgres_server.pause, postgres_server.resume),
    ):
        clock.passed += FRESH_S
        leave()
        try:
            assert await usable(directory, key_id)
            assert recorder.value(metrics.STORE_UP, "database") == 0
            with pytest.raises(StoreUnavailableError):
                await directory.find(new_key().key_id)
        finally:
            come_back()
        await until(lambda: recorder.value(metrics.STORE_UP, "database") == 1)
        await KeyAdmin(database, clock=clock.time).show(key_id)
        clock.passed += FRESH_S
        assert await usable(directory, key_id)
    await directory.close()
    await database.close()
