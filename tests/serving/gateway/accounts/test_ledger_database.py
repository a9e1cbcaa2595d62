"""The ledger in real databases: exact sums, each request once, outages of a real server, several processes."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import random
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection

from penstock.core.errors import StoreUnavailableError
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.accounts.admin import KeyAdmin
from penstock.serving.gateway.accounts.database import Database
from penstock.serving.gateway.accounts.directory import AccountDirectory
from penstock.serving.gateway.accounts.ledger import BadRecordError, UsageLedger
from penstock.serving.gateway.accounts.ledger_writer import KEEP_SEEN_S, LedgerWriter, build_ledger, spool_folder
from penstock.serving.gateway.accounts.migrate import prepare
from penstock.serving.gateway.accounts.prices import Price, PricedUsage, PriceTable
from penstock.serving.gateway.accounts.rules import KeySettings
from penstock.serving.gateway.accounts.spool import SpoolFolder
from penstock.serving.gateway.accounts.tables import UsageDailyRow, UsageSeenRow
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder
from tests.services import PostgresServer
from tests.serving.gateway.accounts.ledger_records import DAY_S, MARCH, usage

T = TypeVar("T")
PRICES = PriceTable(default=Price(1_000_000, 500_000, 2_000_000))


def new_ledger(database: Database, folder: Path, recorder: Recorder | None = None) -> UsageLedger:
    return UsageLedger(
        LedgerWriter(database),
        recorder or Recorder(),
        prices=PRICES,
        spools=SpoolFolder(folder, 1 << 20),
        journal_interval_s=0.01,
        retry_s=(0.02, 0.1),
    )


async def new_database(url: str, *, timeout_s: float = 5.0) -> Database:
    database = Database(url, timeout_s=timeout_s)
    await prepare(database)
    return database


def priced(*records: object, cost: int = 1) -> list[PricedUsage]:
    return [PricedUsage(record, cost) for record in records]  # type: ignore[arg-type]


async def rows(database: Database) -> list[tuple[object, ...]]:
    """(key, tenant, model, day, requests, cache hits, prompt, cached, output, cost), sorted."""
    async with database.read() as connection:
        return sorted(tuple(row) for row in await connection.execute(select(*UsageDailyRow.__table__.columns)))


async def seen(database: Database) -> int:
    async with database.read() as connection:
        return (await connection.execute(select(func.count()).select_from(UsageSeenRow))).scalar_one()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - files and counters have no event
            await asyncio.sleep(0.01)


async def test_sums_per_key_tenant_model_and_day(database: Database, tmp_path: Path) -> None:
    ledger = new_ledger(database, tmp_path / "spool")
    await ledger.start()
    ledger.record(usage("1", prompt=10, cached=4, output=5))
    ledger.record(usage("2", prompt=20, output=6, at=MARCH + DAY_S - 0.001))
    ledger.record(usage("3", prompt=30, cached=30, output=7, cache="hit"))
    ledger.record(usage("4", prompt=40, cached=40, output=8, cache="coalesced"))
    ledger.record(usage("5", at=MARCH + DAY_S))
    ledger.record(usage("6", at=MARCH - 0.001))
    ledger.record(usage("7", key="other", outcome="cancelled", output=1))
    ledger.record(usage("8", tenant="beta", model="large"))
    await ledger.close()
    march = datetime.date(2026, 3, 1)
    day = datetime.timedelta(days=1)
    assert await rows(database) == [
        ("key", "acme", "small", march - day, 1, 0, 10, 0, 5, 20),
        ("key", "acme", "small", march, 4, 2, 100, 74, 26, (6 + 2 + 10) + (20 + 12)),
        ("key", "acme", "small", march + day, 1, 0, 10, 0, 5, 20),
        ("key", "beta", "large", march, 1, 0, 10, 0, 5, 20),
        ("other", "acme", "small", march, 1, 0, 10, 0, 1, 12),
    ]
    assert await seen(database) == 8


async def test_each_request_counts_once(database: Database) -> None:
    writer = LedgerWriter(database)
    assert await writer.write(priced(usage("1"), usage("2"))) == 2
    assert await writer.write(priced(usage("2"), usage("3"), usage("3", prompt=1000), usage("1"))) == 1
    assert await writer.write(priced(usage("1"), usage("2"), usage("3"))) == 0
    [(*_, requests, _hits, prompt, _cached, _output, cost)] = await rows(database)
    assert (requests, prompt, cost) == (3, 30, 3)


async def test_failure_after_the_commit_does_not_count_twice(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 3
    write = database.write

    @asynccontextmanager
    async def lose_acknowledgement() -> AsyncIterator[AsyncConnection]:
        nonlocal failures
        async with write() as connection:
            yield connection
        if failures:
            failures -= 1
            raise StoreUnavailableError("connection reset")

    monkeypatch.setattr(database, "write", lose_acknowledgement)
    recorder = Recorder()
    ledger = new_ledger(database, tmp_path / "spool", recorder)
    await ledger.start()
    for number in range(50):
        ledger.record(usage(f"r{number}"))
    await ledger.flush()
    await ledger.close()
    assert failures == 0
    [row] = await rows(database)
    assert row[4:] == (50, 0, 500, 0, 250, 50 * 20)
    assert recorder.value(metrics.USAGE_WRITTEN, "written") + recorder.value(metrics.USAGE_WRITTEN, "duplicate") == 50


async def test_failure_inside_the_transaction_leaves_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids without their sums would be usage that nobody ever sees."""
    writer = LedgerWriter(database)
    broken = text("UPDATE no_such_table SET a = 1")
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_add_to_daily", broken)
        with pytest.raises((StoreUnavailableError, ProgrammingError)):
            await writer.write(priced(usage("1")))
    assert await seen(database) == 0
    assert await writer.write(priced(usage("1"))) == 1


async def test_writers_of_several_processes_at_once(database: Database, tmp_path: Path) -> None:
    """Same keys and partly the same requests, in opposite orders: no deadlock, no lost addition."""
    url = database.url.render_as_string(hide_password=False)
    others = [Database(url) for _ in range(4)]
    try:

        async def work(number: int, other: Database) -> None:
            writer = LedgerWriter(other)
            records = [usage(f"shared{i}", key=f"key{i % 7}") for i in range(60)]
            records += [usage(f"own{number}-{i}", key=f"key{i % 7}") for i in range(60)]
            if number % 2:
                records.reverse()
            for start in range(0, len(records), 20):
                batch = priced(*records[start : start + 20])
                while True:
                    try:
                        await writer.write(batch)
                        break
                    except StoreUnavailableError:
                        await asyncio.sleep(0.01)

        await asyncio.gather(*(work(number, other) for number, other in enumerate(others)))
    finally:
        for other in others:
            await other.close()
    found = await rows(database)
    assert sum(int(str(row[4])) for row in found) == 60 + 4 * 60
    assert await seen(database) == 60 + 4 * 60


async def test_hostile_names_are_data(database: Database, tmp_path: Path) -> None:
    names = ["'; DROP TABLE usage_daily; --", '"', "\\", "%s :now $1 {}", "\u2028\n", "日本", '["x"]', "\x01\x7f", ""]
    ledger = new_ledger(database, tmp_path / "spool")
    await ledger.start()
    for name in names:
        ledger.record(usage(f"id {name}", key=name, tenant=name, model=name))
    await ledger.close()
    found = await rows(database)
    assert sorted(str(row[0]) for row in found) == sorted(names)
    assert all(row[0] == row[1] == row[2] and row[4] == 1 for row in found)
    assert await LedgerWriter(database).write(priced(*(usage(f"id {name}") for name in names))) == 0


async def test_names_of_any_length_fit(database: Database, tmp_path: Path) -> None:
    """An index of PostgreSQL takes 2704 bytes; texts that do not compress show it."""
    drawn = random.Random(1)
    key, tenant, model = ("".join(chr(drawn.randrange(0x10000, 0x10FFFF)) for _ in range(2000)) for _ in range(3))
    recorder = Recorder()
    ledger = new_ledger(database, tmp_path / "spool", recorder)
    await ledger.start()
    ledger.record(usage("r" * 100_000, key=key, tenant=tenant, model=model))
    ledger.record(usage("short", model="模" * 256))
    await ledger.close()
    assert [row[2] for row in await rows(database)] == ["模" * 256, model[:192]]
    assert recorder.value(metrics.USAGE_WRITTEN, "written") == 2


@pytest.mark.postgresql
async def test_sum_beyond_64_bits_is_a_bad_record(postgres_server: PostgresServer) -> None:
    database = await new_database(postgres_server.fresh())
    writer = LedgerWriter(database)
    await writer.write([PricedUsage(usage("1"), 2**63 - 10)])
    with pytest.raises(BadRecordError, match="out of range"):
        await writer.write([PricedUsage(usage("2"), 2**62)])
    assert await seen(database) == 1
    await database.close()


async def test_ids_are_forgotten_after_seven_days_in_small_batches(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.serving.gateway.accounts.ledger_writer._PRUNED_ROWS", 10)
    now = MARCH
    writer = LedgerWriter(database, clock=lambda: now)
    await writer.write(priced(*(usage(f"old{number}") for number in range(35))))
    now += 3600
    await writer.write(priced(*(usage(f"young{number}") for number in range(5))))
    await writer.housekeeping()
    assert await seen(database) == 40
    now = MARCH + KEEP_SEEN_S + 1
    await writer.housekeeping()
    assert await seen(database) == 5
    assert await writer.write(priced(usage("young0"))) == 0


async def test_missing_tables_keep_the_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = Database(f"sqlite:///{tmp_path}/empty.db")
    ledger = new_ledger(database, tmp_path / "spool")
    await ledger.start()
    ledger.record(usage("1"))
    await until(lambda: "no such table" in caplog.text)
    await prepare(database)
    await ledger.flush()
    await ledger.close()
    assert len(await rows(database)) == 1
    await database.close()


async def test_sqlite_file_that_another_program_locks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = await new_database(f"sqlite:///{tmp_path}/usage.db", timeout_s=0.1)
    ledger = new_ledger(database, tmp_path / "spool")
    await ledger.start()
    with contextlib.closing(sqlite3.connect(tmp_path / "usage.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        ledger.record(usage("r1"))
        await until(lambda: bool(caplog.records))
        ledger.record(usage("r2"))
        other.execute("ROLLBACK")
    await ledger.flush()
    await ledger.close()
    assert await seen(database) == 2
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    await database.close()


@pytest.mark.postgresql
@pytest.mark.parametrize("how", ["stopped", "hanging"])
async def test_real_server_goes_away_and_comes_back(
    how: str, postgres_server: PostgresServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "penstock.serving.gateway.accounts.ledger")
    database = await new_database(postgres_server.fresh(), timeout_s=5.0 if how == "stopped" else 1.5)
    recorder = Recorder()
    ledger = new_ledger(database, tmp_path / "spool", recorder)
    await ledger.start()
    count = 0

    async def some_records() -> None:
        nonlocal count
        for _ in range(40):
            ledger.record(usage(f"r{count}"))
            count += 1
            await asyncio.sleep(0.005)

    await some_records()
    await ledger.flush()
    caplog.clear()
    await asyncio.to_thread(postgres_server.stop if how == "stopped" else postgres_server.pause)
    try:
        await some_records()
        await until(lambda: recorder.value(metrics.STORE_UP, "database") == 0 and bool(caplog.records))
        await some_records()
        await until(lambda: recorder.value(metrics.USAGE_WRITTEN, "spooled") >= 40)
        assert len(caplog.records) == 1
    finally:
        await asyncio.to_thread(postgres_server.start if how == "stopped" else postgres_server.resume)
    await some_records()
    await asyncio.wait_for(ledger.flush(), 30)
    await ledger.close()
    [row] = await rows(database)
    assert row[4:] == (160, 0, 1600, 0, 800, 160 * 20)
    assert recorder.value(metrics.USAGE_WRITTEN, "lost") == 0
    assert "pn-test-password" not in caplog.text
    await database.close()


async def test_cost_spends_the_budget_of_the_key(database: Database, tmp_path: Path) -> None:
    key = (await KeyAdmin(database).create("acme", settings=KeySettings(budget_micros=50), actor="test")).info.id
    now = 0.0
    directory = AccountDirectory(database, Recorder(), clock=lambda: now)
    ledger = new_ledger(database, tmp_path / "spool")
    await ledger.start()

    async def over_budget() -> bool:
        nonlocal now
        now += 60
        entry = await directory.find(key)
        assert entry is not None
        return entry.identity.over_budget

    # 20 micro-units each; what a cache answers costs nothing.
    for number in range(2):
        ledger.record(usage(f"r{number}", key=key))
        ledger.record(usage(f"hit{number}", key=key, cache="hit"))
    await ledger.flush()
    assert not await over_budget()
    ledger.record(usage("r2", key=key))
    await ledger.flush()
    assert await over_budget()
    await ledger.close()
    await directory.close()


def test_spool_folders_of_two_databases_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A spool is written into the database of whoever finds it."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    one = spool_folder(Database("postgresql://a:secret@host/one"))
    assert one.parent == tmp_path / "penstock"
    assert one == spool_folder(Database("postgres://a:changed@host/one"))
    assert one != spool_folder(Database("postgresql://a:secret@host/two"))
    assert spool_folder(Database(f"sqlite:///{tmp_path}/a.db")) == tmp_path / "a.db-spool"


async def test_built_from_settings(tmp_path: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text("[default]\nprompt = 1\noutput = 2\n")
    database = await new_database(f"sqlite:///{tmp_path}/usage.db")
    ledger = build_ledger(GatewayConfig(price_table=str(prices)), database, Recorder())
    await ledger.start()
    assert len(list((tmp_path / "usage.db-spool").iterdir())) == 1
    ledger.record(usage("1"))
    await ledger.close()
    without_spool = build_ledger(GatewayConfig(usage_spool_mib=0), database, Recorder())
    await without_spool.start()
    without_spool.record(usage("2"))
    await without_spool.close()
    [row] = await rows(database)
    assert row[4:] == (2, 0, 20, 0, 10, 20)
    await database.close()
