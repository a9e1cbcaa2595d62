"""The database and its migrations: what URLs mean, what happens while it is away, and who may change the schema."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from penstock.core.errors import ConfigError, StoreUnavailableError
from penstock.serving.gateway.accounts import database as database_module
from penstock.serving.gateway.accounts import migrate
from penstock.serving.gateway.accounts.database import Database, reason_of
from penstock.serving.gateway.accounts.tables import Base, KeyRow, TenantRow
from tests.services import PostgresServer


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("sqlite:////tmp/x.db", "sqlite:////tmp/x.db"),
        ("postgres://u:secret@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:secret@h:5433/db?sslmode=require", "postgresql://u:***@h:5433/db?ssl=require"),
        ("postgresql+asyncpg://u:secret@h/db", "postgresql://u:***@h/db"),
    ],
)
def test_urls_that_work(given: str, shown: str) -> None:
    url = database_module.parse_url(given)
    name = url.set(drivername=url.get_backend_name()).render_as_string(hide_password=True)
    assert name == shown


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sqlite://", "must name a file"),
        ("sqlite:///:memory:", "must name a file"),
        ("sqlite:///x.db?mode=ro", "must name a file"),
        ("mysql://u:secret@h/db", "'mysql' is not supported"),
        ("u:secret@h/db", "cannot be read"),
        ("postgresql://u:secret@h:port/db", "cannot be read"),
        ("postgresql://u:secret@h/db?password=secret2", "'password'"),
        ("sqlite:////nowhere/at/all.db", "/nowhere/at/all.db cannot be opened: No such file or directory"),
    ],
)
def test_urls_that_do_not(given: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Database(given)
    assert expected in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("driver", "extra"), [("aiosqlite", "server"), ("asyncpg", "postgresql")])
def test_a_missing_driver_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: str, extra: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    url = f"sqlite:///{tmp_path}/x.db" if driver == "aiosqlite" else "postgresql://h/db"
    with pytest.raises(ConfigError, match=rf"{driver}.*penstock\[{extra}\]"):
        Database(url)


async def test_the_default_is_a_private_file_in_the_data_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    database = Database()
    await migrate.prepare(database)
    folder = tmp_path / "data" / "penstock"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = list(folder.iterdir())
    assert folder / "penstock.db" in files
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    await database.close()


async def test_sqlite_settings(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/x.db", timeout_s=3)
    async with database.read() as connection:
        found = [
            (await connection.execute(text(f"PRAGMA {name}"))).scalar_one()
            for name in ("journal_mode", "foreign_keys", "busy_timeout", "synchronous")
        ]
    assert found == ["wal", 1, 3000, 1]
    await database.close()


async def test_a_failed_transaction_leaves_nothing(database: Database) -> None:
    async def fail() -> None:
        async with database.write() as connection:
            await connection.execute(insert(TenantRow).values(name="acme", created_at=0.0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    async with database.read() as connection:
        assert (await connection.execute(select(TenantRow.name))).all() == []


async def test_errors_of_statements_show_no_values(database: Database) -> None:
    async def fail() -> None:
        async with database.write() as connection:
            await connection.execute(
                insert(KeyRow).values(id="a", tenant="nobody", secret_hash=b"very-secret", label="very-secret")
            )

    with pytest.raises(IntegrityError) as caught:
        await fail()
    assert "very-secret" not in str(caught.value)


async def test_a_table_that_is_not_there_is_not_a_database_that_is_away(database_url: str) -> None:
    database = Database(database_url)

    async def ask() -> None:
        async with database.read() as connection:
            await connection.execute(text("SELECT * FROM nowhere"))

    with pytest.raises(DBAPIError, match="nowhere"):
        await ask()
    await database.close()


async def test_writers_wait_for_each_other(database: Database) -> None:
    """Read, then write, in many transactions at once: none fails and none is lost (a deferred SQLite transaction would)."""
    tenant = text("INSERT INTO tenants (name, rpm, created_at) VALUES ('acme', 0, 0)")
    async with database.write() as connection:
        await connection.execute(tenant)

    async def increment() -> None:
        async with database.write() as connection:
            lock = "" if database.is_sqlite else " FOR UPDATE"
            found = (await connection.execute(text(f"SELECT rpm FROM tenants{lock}"))).scalar_one()  # noqa: S608
            await asyncio.sleep(0)
            await connection.execute(text("UPDATE tenants SET rpm = :rpm"), {"rpm": found + 1})

    await asyncio.gather(*(increment() for _ in range(20)))
    async with database.read() as connection:
        assert (await connection.execute(select(TenantRow.rpm))).scalar_one() == 20


async def test_a_locked_sqlite_file_is_away(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/x.db", timeout_s=0.3)
    await migrate.prepare(database)
    blocker = sqlite3.connect(tmp_path / "x.db")
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailableError):
        async with database.write() as connection:
            await connection.execute(text("DELETE FROM tenants"))
    blocker.close()
    async with database.write() as connection:
        await connection.execute(text("DELETE FROM tenants"))
    await database.close()


@pytest.mark.postgresql
async def test_postgresql_away_and_back(postgres_server: PostgresServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "penstock")
    url = postgres_server.fresh()
    database = Database(url, timeout_s=1)

    async def ask() -> int:
        async with database.read() as connection:
            return int((await connection.execute(text("SELECT 1"))).scalar_one())

    assert await ask() == 1
    for leave, come_back in (
        (postgres_server.stop, postgres_server.start),
        (postgres_server.pause, postgres_server.resume),
    ):
        leave()
        try:
            with pytest.raises(StoreUnavailableError) as caught:
                await ask()
        finally:
            come_back()
        assert "postgresql://penstock:***@" in reason_of(caught.value)
        assert await ask() == 1
    password = database.url.password
    assert isinstance(password, str)
    assert password not in caplog.text
    await database.close()

    wrong = Database(url.replace(password, "guess-me"), timeout_s=1)
    with pytest.raises(StoreUnavailableError) as caught:
        await ask_of(wrong)
    assert "password authentication failed" in reason_of(caught.value)
    assert "guess-me" not in reason_of(caught.value) + caplog.text
    await wrong.close()


async def ask_of(database: Database) -> None:
    async with database.read() as connection:
        await connection.execute(text("SELECT 1"))


# ---- migrations ----


def differences(connection: Connection) -> list[object]:
    context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
    return list(compare_metadata(context, Base.metadata))


async def test_migrations_make_exactly_the_tables(database: Database) -> None:
    async with database.read() as connection:
        assert await connection.run_sync(differences) == []
    assert (await migrate.read_schema(database)).state == "current"


async def test_an_upgrade_is_done_once(database_url: str) -> None:
    database = Database(database_url)
    assert (await migrate.read_schema(database)).state == "empty"
    assert (await migrate.upgrade(database)).state == "empty"
    assert (await migrate.upgrade(database)).state == "current"
    await database.close()


async def test_a_newer_schema_is_refused(database: Database) -> None:
    async with database.write() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = 'z9999'"))
    for step in (migrate.prepare, migrate.upgrade):
        with pytest.raises(ConfigError, match="has schema 'z9999', which this version of Penstock does not know"):
            await step(database)


async def test_a_foreign_database_is_refused(database_url: str) -> None:
    database = Database(database_url)
    async with database.write() as connection:
        await connection.execute(text("CREATE TABLE api_keys (id INTEGER)"))
    with pytest.raises(ConfigError, match="Penstock did not make"):
        await migrate.prepare(database)
    await database.close()


async def test_an_old_schema(database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A version of Penstock with one more migration: SQLite is upgraded by the server, PostgreSQL by the operator."""
    add_migration(monkeypatch, tmp_path)
    assert (await migrate.read_schema(database)).state == "old"
    if database.is_sqlite:
        await migrate.prepare(database)
    else:
        with pytest.raises(ConfigError, match=r"older schema \(a0001, needed: a0002\)\. Run `penstock db upgrade`"):
            await migrate.prepare(database)
        await migrate.upgrade(database)
    assert (await migrate.read_schema(database)).state == "current"


@pytest.mark.postgresql
async def test_a_user_without_rights_is_told(postgres_server: PostgresServer) -> None:
    url = postgres_server.fresh()
    name = url.rpartition("/")[2]
    postgres_server.sql(f"CREATE ROLE reader_{name} LOGIN PASSWORD 'r'")
    database = Database(f"postgresql://reader_{name}:r@{url.rpartition('@')[2]}")
    with pytest.raises(ConfigError, match=r"cannot be changed: .*permission denied"):
        await migrate.prepare(database)
    await database.close()


async def test_a_migration_that_fails_leaves_the_old_schema(
    database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add_migration(monkeypatch, tmp_path, after="raise RuntimeError('half way')")
    with pytest.raises(RuntimeError, match="half way"):
        await migrate.upgrade(database)
    assert (await migrate.read_schema(database)).revision == "a0001"
    async with database.read() as connection:
        assert await connection.run_sync(differences) == []


def add_migration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: str = "pass") -> None:
    """Use a copy of the migrations with another one behind them."""
    source = Path(migrate.__file__).with_name("migrations")
    shutil.copytree(source, tmp_path / "copy" / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "copy" / "migrations" / "versions" / "a0002_more.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n"
        "revision = 'a0002'\ndown_revision = 'a0001'\nbranch_labels = None\ndepends_on = None\n"
        "def upgrade():\n"
        "    op.add_column('tenants', sa.Column('note', sa.String))\n"
        f"    {after}\n"
    )
    monkeypatch.setattr(migrate, "__file__", str(tmp_path / "copy" / "migrate.py"))


def test_two_processes_upgrade_at_once(database_url: str) -> None:
    """Both end well, and one of them has done the work."""
    program = (
        "import asyncio, sys\n"
        "from penstock.serving.gateway.accounts import migrate\n"
        "from penstock.serving.gateway.accounts.database import Database\n"
        "async def main():\n"
        "    database = Database(sys.argv[1])\n"
        "    await migrate.read_schema(database)\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    print((await migrate.upgrade(database)).state)\n"
        "    await database.close()\n"
        "asyncio.run(main())\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, database_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": ""},
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(out.strip() for out, _ in outputs) == ["current", "empty"]
