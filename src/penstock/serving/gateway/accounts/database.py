"""The database of accounts and usage: SQLite in a file, or PostgreSQL; pooled, with a time-out on everything.

    async with database.read() as connection: …      a snapshot
    async with database.write() as connection: …     one transaction, committed at the end

Both raise StoreUnavailableError when the database is away, too slow or locked for too long. Messages and log lines never show a
password or the parameters of a statement. Errors of a statement itself (a violated constraint) pass as SQLAlchemy's.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from penstock.core.errors import ConfigError, StoreUnavailableError

logger = logging.getLogger(__name__)

_WRITE = "penstock_write"
_POOL_SIZE = 5
_MAX_OVERFLOW = 5
# What libpq calls `sslmode` asyncpg calls `ssl`; the values are the same.
_POSTGRES_OPTIONS = {"sslmode": "ssl", "ssl": "ssl", "host": "host", "port": "port"}

# SQLSTATE: connection lost, transaction rolled back (deadlock), out of resources, shutting down, system error; a standby server.
_TRANSIENT_CLASSES = frozenset({"08", "40", "53", "57", "58"})
_READ_ONLY = "25006"


class Database:
    """Used from one event loop. Nothing connects before the first use.

    Raises ConfigError for a URL that cannot be used and for a driver that is not installed.
    """

    def __init__(self, url: str | None = None, *, timeout_s: float = 5.0) -> None:
        self.url = parse_url(url) if url else default_url()
        self.timeout_s = timeout_s
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine: AsyncEngine = (
            _sqlite_engine(self.url, timeout_s) if self.is_sqlite else _postgres_engine(self.url, timeout_s)
        )
        self._writing = self.engine.execution_options(**{_WRITE: True})

    @property
    def name(self) -> str:
        """The URL without password, for people."""
        return self.url.set(drivername=self.url.get_backend_name()).render_as_string(hide_password=True)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection inside a transaction that reads."""
        async with self._available(), self.engine.connect() as connection:
            yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A connection inside a transaction that is committed at the end and rolled back on an error. On SQLite it is the only writer
        from its first statement on."""
        async with self._available(), self._writing.begin() as connection:
            yield connection

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        await self.engine.dispose()

    @asynccontextmanager
    async def _available(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.timeout_s):
                yield
        except (OSError, TimeoutError, PoolTimeoutError) as error:
            raise self._away(error) from None
        except DBAPIError as error:
            if _is_transient(error):
                raise self._away(error.orig or error) from None
            raise
        except Exception as error:
            # asyncpg's own errors while it connects (a wrong password, a server that starts or is full) come as they are.
            if type(error).__module__.startswith("asyncpg."):
                raise self._away(error) from None
            raise

    def _away(self, error: BaseException) -> StoreUnavailableError:
        logger.debug("database %s: %s: %s", self.name, type(error).__name__, error)
        unavailable = StoreUnavailableError("The account database is not available. Retry shortly.")
        unavailable.add_note(f"{self.name}: {type(error).__name__}: {error}")
        return unavailable


def _is_transient(error: DBAPIError) -> bool:
    """Whether the database is at fault, not the statement. An error without a statement comes from connecting or committing."""
    if error.connection_invalidated or error.statement is None:
        return True
    if isinstance(error, OperationalError | InterfaceError):
        # SQLite says OperationalError for a locked file, a full disk and, under this code, for a table that is not there.
        return getattr(error.orig, "sqlite_errorcode", None) != sqlite3.SQLITE_ERROR
    state = str(getattr(error.orig, "sqlstate", None) or "")
    return state[:2] in _TRANSIENT_CLASSES or state == _READ_ONLY


def reason_of(error: StoreUnavailableError) -> str:
    """What an operator is told about a database that is away: its name and the driver's words, in one line."""
    notes = getattr(error, "__notes__", None) or [error.message]
    return " ".join(str(notes[0]).split())


def default_url() -> URL:
    """The SQLite file in the user's data folder, which is made for this user only. Raises ConfigError."""
    folder = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "penstock"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The data folder {folder} cannot be made: {error.strerror}. Give --database-url or set XDG_DATA_HOME."
        ) from None
    return URL.create("sqlite+aiosqlite", database=str(folder / "penstock.db"))


def parse_url(text: str) -> URL:
    """The URL for SQLAlchemy's async drivers. Raises ConfigError, which never repeats the URL: it may hold a password."""
    usage = "Use sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME."
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ConfigError(f"The database URL cannot be read. {usage}") from None
    scheme = url.drivername
    if scheme in ("sqlite", "sqlite+aiosqlite"):
        if not url.database or url.database == ":memory:" or url.host or url.query:
            raise ConfigError(f"The database URL must name a file and nothing else. {usage}")
        return url.set(drivername="sqlite+aiosqlite")
    if scheme in ("postgres", "postgresql", "postgresql+asyncpg"):
        unknown = sorted(set(url.query) - set(_POSTGRES_OPTIONS))
        if unknown:
            raise ConfigError(
                f"The database URL has an option that is not known: {unknown[0][:64]!r}. Known: sslmode, host, port."
            )
        query = {_POSTGRES_OPTIONS[name]: value for name, value in url.query.items()}
        return url.set(drivername="postgresql+asyncpg", query=query)
    raise ConfigError(f"The database {scheme[:32]!r} is not supported. {usage}")


def _sqlite_engine(url: URL, timeout_s: float) -> AsyncEngine:
    _need("aiosqlite", "server")
    _make_private(Path(url.database or ""))
    engine = create_async_engine(
        url,
        hide_parameters=True,
        pool_size=_POOL_SIZE,
        max_overflow=_MAX_OVERFLOW,
        pool_timeout=timeout_s,
        connect_args={"timeout": timeout_s},
    )

    @event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        # The driver would begin transactions at its own moments, and none for DDL; `begin` below does instead.
        connection.isolation_level = None
        cursor = connection.cursor()
        # WAL: readers do not wait for the writer. NORMAL: a power failure may take the last commits, never the file.
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later fails when another wrote between; IMMEDIATE waits its turn instead.
        write = connection.get_execution_options().get(_WRITE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _postgres_engine(url: URL, timeout_s: float) -> AsyncEngine:
    _need("asyncpg", "postgresql")
    return create_async_engine(
        url,
        hide_parameters=True,
        pool_size=_POOL_SIZE,
        max_overflow=_MAX_OVERFLOW,
        pool_timeout=timeout_s,
        # A restart of the server breaks pooled connections; the ping replaces them unnoticed.
        pool_pre_ping=True,
        connect_args={"timeout": timeout_s, "command_timeout": timeout_s},
    )


def _need(driver: str, extra: str) -> None:
    if importlib.util.find_spec(driver) is None:
        raise ConfigError(
            f"This database needs the package {driver}; install it with `pip install 'penstock[{extra}]'`."
        )


def _make_private(file: Path) -> None:
    """Create the file readable by its user only; SQLite gives its side files the same mode. Raises ConfigError."""
    try:
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise ConfigError(f"The database file {file} cannot be opened: {error.strerror}.") from None
