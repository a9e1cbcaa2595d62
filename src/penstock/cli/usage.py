"""`penstock usage`: what keys, tenants and models have used."""

from __future__ import annotations

import asyncio
import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from penstock.cli.options import SettingsCommand

if TYPE_CHECKING:
    from penstock.serving.gateway.accounts.database import Database
    from penstock.serving.gateway.accounts.usage_report import Grouping, UsageQuery, UsageReport

DAY = click.DateTime(formats=["%Y-%m-%d"])


@click.command(cls=SettingsCommand)
@click.option("--tenant", help="Only this tenant.")
@click.option("--key", help="Only the key with this id, or jwt:SUBJECT.")
@click.option("--model", help="Only this model.")
@click.option("--from", "first", type=DAY, metavar="DATE", help="From this day on (UTC), such as 2026-01-31.")
@click.option("--to", "last", type=DAY, metavar="DATE", help="Up to this day, it included (UTC).")
@click.option(
    "--by",
    type=click.Choice(["day", "key", "tenant", "model"]),
    multiple=True,
    default=("day",),
    show_default=True,
    help="One row for each of these; repeatable.",
)
@click.option("--csv", "form", flag_value="csv", help="Print CSV, without totals.")
@click.option("--json", "form", flag_value="json", help="Print JSON.")
@click.option(
    "--database-url",
    envvar="PENSTOCK_DATABASE_URL",
    help="sqlite:///FILE or postgresql://…; the SQLite file in the data folder if not given.",
)
@click.option("--price-table", envvar="PENSTOCK_PRICE_TABLE", help="The server's price table; names the currency.")
def usage(
    tenant: str | None,
    key: str | None,
    model: str | None,
    first: datetime.datetime | None,
    last: datetime.datetime | None,
    by: tuple[Grouping, ...],
    form: str | None,
    database_url: str | None,
    price_table: str | None,
) -> None:
    """Print requests, tokens and cost by day, key, tenant or model.

    Servers write their usage within a second; while the database is away they keep it and write it later.
    """
    from penstock.cli.packages import require

    require("server", "aiosqlite", "alembic", "sqlalchemy")
    from penstock.serving.gateway.accounts.prices import load_prices
    from penstock.serving.gateway.accounts.usage_report import UsageQuery, as_csv, as_json, as_table

    if first is not None and last is not None and first > last:
        raise click.BadParameter(f"{first:%Y-%m-%d} is after --to {last:%Y-%m-%d}.", param_hint="--from")
    query = UsageQuery(
        tenant=tenant,
        key=key,
        model=model,
        first=None if first is None else first.date(),
        last=None if last is None else last.date(),
        by=tuple(dict.fromkeys(by)),
    )
    currency = load_prices(price_table).currency if price_table else None
    report = asyncio.run(_read(database_url, query, currency))
    render = {None: as_table, "csv": as_csv, "json": as_json}[form]
    click.echo(render(report).rstrip("\n"))


async def _read(url: str | None, query: UsageQuery, currency: str | None) -> UsageReport:
    from penstock.core.errors import ConfigError, StoreUnavailableError
    from penstock.serving.gateway.accounts.database import reason_of
    from penstock.serving.gateway.accounts.migrate import read_schema
    from penstock.serving.gateway.accounts.usage_report import read_usage

    database = _existing(url)
    try:
        schema = await read_schema(database)
        if schema.state == "old":
            raise ConfigError(f"The database {database.name} has an older schema. Run `penstock db upgrade`.")
        if schema.state != "current":
            raise ConfigError(f"The database {database.name} has no usage of this version of Penstock.")
        return await read_usage(database, query, currency=currency)
    except StoreUnavailableError as error:
        raise StoreUnavailableError(f"The account database cannot be read. {reason_of(error)}") from None
    finally:
        await database.close()


def _existing(url: str | None) -> Database:
    """The database. Reading must not leave an empty SQLite file behind."""
    from penstock.core.errors import ConfigError
    from penstock.serving.gateway.accounts.database import Database, default_url, parse_url

    parsed = parse_url(url) if url else default_url()
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists():
        raise ConfigError(f"There is no database {parsed.database}; give the server's with --database-url.")
    return Database(url)
