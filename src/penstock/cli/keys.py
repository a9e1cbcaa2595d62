"""`penstock keys`: make, list, show, rotate and revoke API keys, and set limits of tenants."""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from penstock.cli.options import debug_option
from penstock.core.errors import InvalidRequestError, PenstockError, StoreUnavailableError

if TYPE_CHECKING:
    from penstock.serving.gateway.accounts.admin import CreatedKey, KeyAdmin, KeyInfo, TenantInfo

T = TypeVar("T")
ACTOR = "cli"
_COLUMNS = (
    "ID",
    "TENANT",
    "ROLE",
    "STATE",
    "LABEL",
    "RPM",
    "TPM",
    "CONCURRENCY",
    "BUDGET",
    "SPENT",
    "CREATED",
    "EXPIRES",
)
_NO_LIMIT = "none"


class _LimitType(click.ParamType[int]):
    """A number of at least 1, or "none" for no limit, which becomes 0."""

    name = "N|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == _NO_LIMIT:
            return 0
        number = click.INT.convert(value, param, ctx)
        if number < 1:
            self.fail(f"{number} is not at least 1; for no limit say {_NO_LIMIT!r}.", param, ctx)
        return number


def with_database(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the option --database-url."""
    return click.option(
        "--database-url",
        envvar="PENSTOCK_DATABASE_URL",
        show_envvar=True,
        help="sqlite:///FILE or postgresql://…; without it the SQLite file in the data folder.",
    )(function)


def use_accounts(database_url: str | None, work: Callable[[KeyAdmin], Awaitable[T]]) -> T:
    """What `work` returns, over a database with the current schema. Raises PenstockError and UsageError with one line."""
    from penstock.cli.packages import require

    require("server", "aiosqlite", "alembic", "sqlalchemy")
    from penstock.serving.gateway.accounts import migrate
    from penstock.serving.gateway.accounts.admin import KeyAdmin
    from penstock.serving.gateway.accounts.database import Database, reason_of

    async def run() -> T:
        database = Database(database_url)
        try:
            await migrate.prepare(database)
            return await work(KeyAdmin(database))
        finally:
            await database.close()

    try:
        return asyncio.run(run())
    except InvalidRequestError as error:
        raise click.UsageError(error.message) from None
    except StoreUnavailableError as error:
        raise PenstockError(f"The account database cannot be used. {reason_of(error)}") from None


@click.group(params=[debug_option()], no_args_is_help=False)
def keys() -> None:
    """Make, list, rotate and revoke API keys.

    A running server notices every change within two seconds.
    """


@keys.command()
@click.option("--tenant", required=True, metavar="NAME", help="Whom the key belongs to; made when new.")
@click.option("--role", type=click.Choice(["user", "admin"]), default="user", show_default=True)
@click.option("--rpm", type=int, help="Requests per minute.")
@click.option("--tpm", type=int, help="Tokens per minute.")
@click.option("--concurrency", type=int, help="Concurrent requests.")
@click.option("--models", metavar="A,B", help="Models that may be used; all without it.")
@click.option(
    "--priority", type=int, default=0, show_default=True, help="Added to a request's own; lower is served first."
)
@click.option("--weight", type=float, help="Share of a busy engine, relative to other tenants' (1).")
@click.option("--budget", metavar="AMOUNT", help="Cost after which the key stops, such as 12.50.")
@click.option("--expires", metavar="WHEN", help="A duration such as 30d or a date such as 2027-01-01 (UTC).")
@click.option("--label", default="", metavar="TEXT", help="For people.")
@click.option("--json", "as_json", is_flag=True, help="Print an object with the key in it.")
@with_database
def create(database_url: str | None, as_json: bool, tenant: str, role: str, **values: Any) -> None:
    """Make a key and print it. It is shown only once: the server keeps a hash."""
    from penstock.serving.gateway.accounts.rules import KeySettings, parse_budget, parse_expiry

    models, budget, expires = values.pop("models"), values.pop("budget"), values.pop("expires")

    async def work(admin: KeyAdmin) -> CreatedKey:
        settings = KeySettings(
            models=None if models is None else tuple(name.strip() for name in models.split(",")),
            budget_micros=None if budget is None else parse_budget(budget),
            expires_at=None if expires is None else parse_expiry(expires, time.time()),
            **values,
        )
        return await admin.create(tenant, "admin" if role == "admin" else "user", settings, actor=ACTOR)

    _print_created(use_accounts(database_url, work), as_json)


@keys.command("list")
@click.option("--tenant", metavar="NAME", help="Only the keys of this tenant.")
@click.option("--json", "as_json", is_flag=True, help="Print one object per line.")
@with_database
def list_keys(database_url: str | None, tenant: str | None, as_json: bool) -> None:
    """List keys, the oldest first."""

    async def work(admin: KeyAdmin) -> list[KeyInfo]:
        found: list[KeyInfo] = []
        while page := await admin.keys(tenant, after=found[-1].id if found else ""):
            found += page
        return sorted(found, key=lambda info: (info.created_at, info.id))

    found = use_accounts(database_url, work)
    if as_json:
        for info in found:
            _print_json(info)
    elif found:
        _print_table(found)
    else:
        click.echo("There is no key yet. Make one: penstock keys create --tenant NAME", err=True)


@keys.command()
@click.argument("key_id", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="Print an object.")
@with_database
def show(database_url: str | None, key_id: str, as_json: bool) -> None:
    """Show everything about a key but its secret."""
    _print_key(use_accounts(database_url, lambda admin: admin.show(key_id)), as_json)


@keys.command()
@click.argument("key_id", metavar="ID")
@with_database
def revoke(database_url: str | None, key_id: str) -> None:
    """End a key, for good."""
    info = use_accounts(database_url, lambda admin: admin.revoke(key_id, actor=ACTOR))
    click.echo(f"Key {info.id} of {info.tenant} is revoked.")


@keys.command()
@click.argument("key_id", metavar="ID")
@click.option(
    "--grace", default="0s", metavar="TIME", show_default=True, help="How long the old key still works: 10m, 1h."
)
@click.option("--json", "as_json", is_flag=True, help="Print an object with the key in it.")
@with_database
def rotate(database_url: str | None, key_id: str, grace: str, as_json: bool) -> None:
    """Make a key that takes the place of another, with the same settings."""
    from penstock.serving.gateway.accounts.rules import parse_duration

    async def work(admin: KeyAdmin) -> CreatedKey:
        return await admin.rotate(key_id, actor=ACTOR, grace_s=parse_duration(grace, "grace"))

    _print_created(use_accounts(database_url, work), as_json)


@keys.command(short_help="Show or change the limits of a tenant.")
@click.argument("name")
@click.option("--rpm", type=_LimitType(), help="Requests per minute of all keys together.")
@click.option("--tpm", type=_LimitType(), help="Tokens per minute of all keys together.")
@click.option("--concurrency", type=_LimitType(), help="Concurrent requests of all keys together.")
@click.option("--weight", type=float, help="Share of a busy engine, relative to other tenants' (1).")
@with_database
def tenant(database_url: str | None, name: str, **given: Any) -> None:
    """Show the limits of a tenant, or change those that are given ("none": no limit)."""
    import dataclasses

    from penstock.core.errors import NotFoundError
    from penstock.serving.gateway.accounts.rules import TenantSettings

    weight = given.pop("weight")
    changes = {field: value or None for field, value in given.items() if value is not None}
    if weight is not None:
        changes["weight"] = weight

    async def work(admin: KeyAdmin) -> TenantInfo:
        if not changes:
            return await admin.tenant(name)
        try:
            settings = (await admin.tenant(name)).settings
        except NotFoundError:
            settings = TenantSettings()
        return await admin.set_tenant(name, dataclasses.replace(settings, **changes), actor=ACTOR)

    info = use_accounts(database_url, work)
    for field in dataclasses.fields(info.settings):
        value = getattr(info.settings, field.name)
        click.echo(f"{field.name + ':':14}{_NO_LIMIT if value is None else value}")


def _print_created(created: CreatedKey, as_json: bool) -> None:
    if as_json:
        _print_json(created.info, created.token)
        return
    click.echo(created.token)
    info = created.info
    click.echo(f"Key {info.id} of {info.tenant}, role {info.role}. Keep it now: it is not shown again.", err=True)


def _print_key(info: KeyInfo, as_json: bool) -> None:
    import msgspec

    from penstock.serving.gateway.schemas.admin import key_object

    if as_json:
        _print_json(info)
        return
    for name, value in msgspec.to_builtins(key_object(info, time.time())).items():
        if name != "object":
            click.echo(f"{name + ':':14}{_time(value) if name.endswith('_at') else _text(value)}")


def _print_json(info: KeyInfo, token: str | None = None) -> None:
    import msgspec

    from penstock.serving.gateway.schemas.admin import key_object

    click.echo(msgspec.json.encode(key_object(info, time.time(), token)).decode())


def _print_table(found: Sequence[KeyInfo]) -> None:
    from penstock.serving.gateway.accounts.rules import show_money

    now = time.time()
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for info in found:
        settings = info.settings
        budget = None if settings.budget_micros is None else show_money(settings.budget_micros)
        limits = (settings.rpm, settings.tpm, settings.concurrency, budget, show_money(info.spent_micros))
        texts = (info.id, info.tenant, info.role, info.state(now), settings.label[:40], *limits)
        row = (*map(_text, texts), _time(info.created_at), _time(settings.expires_at))
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    for row in rows:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "-" if value is None or value == "" else str(value)


def _time(value: float | None) -> str:
    if value is None:
        return "-"
    return datetime.datetime.fromtimestamp(value, datetime.UTC).strftime("%Y-%m-%d %H:%M")
