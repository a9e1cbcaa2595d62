"""Brings a database to the schema of this version: Alembic migrations that come with the package.

One process migrates, others wait: everything happens in one transaction that holds a lock from its first statement on (on PostgreSQL
an advisory lock, on SQLite the write lock of BEGIN IMMEDIATE), and whoever comes second finds the work done. A process that dies
in the middle leaves the old schema.

    prepare     at the server's start: an empty database is filled; an old SQLite file is upgraded; an old PostgreSQL database is not,
                because other servers of the old version may be using it
    upgrade     `penstock db upgrade`
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError

from penstock.core.errors import ConfigError, StoreUnavailableError
from penstock.serving.gateway.accounts.database import Database, reason_of

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

logger = logging.getLogger(__name__)

State = Literal["empty", "old", "current", "newer"]
# "pnstck" as a number; the same for every version, other programs in the same database choose others.
_ADVISORY_LOCK = 0x706E7374636B
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Schema:
    """`revision`: what the database has, None when it has nothing of ours. `head`: what this version needs."""

    state: State
    revision: str | None
    head: str


async def read_schema(database: Database) -> Schema:
    """Where a database stands. Raises StoreUnavailableError."""
    async with database.read() as connection:
        return await connection.run_sync(_schema)


async def upgrade(database: Database) -> Schema:
    """Migrate to the head; what the database was before. Raises ConfigError for a newer schema, and StoreUnavailableError."""
    return await _upgrade(database, frozenset({"empty", "old"}))


async def prepare(database: Database) -> None:
    """Make the database usable by a server that starts. Raises ConfigError, which says what to do."""
    try:
        schema = await read_schema(database)
        _refuse_newer(schema, database)
        if schema.state == "empty" or (schema.state == "old" and database.is_sqlite):
            schema = await _upgrade(database, frozenset({"empty", "old"} if database.is_sqlite else {"empty"}))
    except StoreUnavailableError as error:
        raise ConfigError(f"The account database cannot be used. {reason_of(error)}") from None
    if schema.state == "old" and not database.is_sqlite:
        raise ConfigError(
            f"The database {database.name} has an older schema ({schema.revision}, needed: {schema.head}). "
            "Run `penstock db upgrade`."
        )


async def _upgrade(database: Database, states: frozenset[State]) -> Schema:
    """Migrate if the schema is in one of `states` once the lock is held."""
    # Waiting for another process that migrates takes longer than a request may wait.
    patient = Database(database.url.render_as_string(hide_password=False), timeout_s=_TIMEOUT_S)
    try:
        async with patient.write() as connection:
            if not patient.is_sqlite:
                await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _ADVISORY_LOCK})
            before = await connection.run_sync(_schema)
            _refuse_newer(before, database)
            if before.state in states:
                await connection.run_sync(_migrate)
                logger.info("database %s: schema %s → %s", database.name, before.revision or "empty", before.head)
            return before
    except DBAPIError as error:
        reason = " ".join(str(error.orig).split())
        raise ConfigError(f"The schema of the database {database.name} cannot be changed: {reason}.") from error
    finally:
        await patient.close()


def _refuse_newer(schema: Schema, database: Database) -> None:
    if schema.state == "newer":
        raise ConfigError(
            f"The database {database.name} has schema {schema.revision!r}, which this version of Penstock does not know "
            f"(its own is {schema.head}). Use the newer version, or another database."
        )


def _schema(connection: Connection) -> Schema:
    from alembic.runtime.migration import MigrationContext

    scripts = _scripts()
    head = scripts.get_current_head()
    if head is None:
        raise ConfigError("The migrations are missing from this installation of Penstock.")
    revision = MigrationContext.configure(connection).get_current_revision()
    if revision is None:
        if inspect(connection).has_table("api_keys"):
            raise ConfigError("The database has a table api_keys that Penstock did not make. Use another database.")
        return Schema("empty", None, head)
    if revision == head:
        return Schema("current", revision, head)
    known = {script.revision for script in scripts.walk_revisions()}
    return Schema("old" if revision in known else "newer", revision, head)


def _migrate(connection: Connection) -> None:
    from alembic import command

    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _scripts() -> ScriptDirectory:
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    # A percent sign in the path would be taken for interpolation.
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    return config
