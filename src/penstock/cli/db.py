"""`penstock db`: the schema of the account database."""

from __future__ import annotations

import asyncio

import click

from penstock.cli.keys import with_database
from penstock.cli.options import debug_option
from penstock.core.errors import PenstockError, StoreUnavailableError


@click.group(params=[debug_option()], no_args_is_help=False)
def db() -> None:
    """Look after the account database.

    A server fills an empty database by itself and upgrades a SQLite file. PostgreSQL, which other servers may be using, is upgraded here.
    """


@db.command()
@click.option("--check", is_flag=True, help="Change nothing; exit code 1 if an upgrade is needed.")
@with_database
def upgrade(database_url: str | None, check: bool) -> None:
    """Bring the database to the schema of this version. Safe to run twice, and in several places at once."""
    click.echo(asyncio.run(_upgrade(database_url, check)))


async def _upgrade(database_url: str | None, check: bool) -> str:
    from penstock.cli.packages import require

    require("server", "aiosqlite", "alembic", "sqlalchemy")
    from penstock.serving.gateway.accounts import migrate
    from penstock.serving.gateway.accounts.database import Database, reason_of

    database = Database(database_url)
    try:
        if not check:
            before = await migrate.upgrade(database)
            done = "has" if before.state == "current" else "now has"
            return f"{database.name} {done} schema {before.head}."
        schema = await migrate.read_schema(database)
    except StoreUnavailableError as error:
        raise PenstockError(f"The account database cannot be used. {reason_of(error)}") from None
    finally:
        await database.close()
    if schema.state != "current":
        raise PenstockError(
            f"{database.name} has schema {schema.revision or 'none'}, this version needs {schema.head}. "
            + ("Use the newer version of Penstock." if schema.state == "newer" else "Run `penstock db upgrade`.")
        )
    return f"{database.name} has schema {schema.head}."
