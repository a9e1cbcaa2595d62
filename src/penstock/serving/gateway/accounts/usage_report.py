"""Reads the ledger for people and programs: sums by day, key, tenant or model, as a table, CSV or JSON."""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import msgspec
from sqlalchemy import Select, func, select

from penstock.core.log import one_line
from penstock.serving.gateway.accounts.database import Database
from penstock.serving.gateway.accounts.prices import MICROS
from penstock.serving.gateway.accounts.tables import UsageDailyRow

Grouping = Literal["day", "key", "tenant", "model"]
GROUPINGS: tuple[Grouping, ...] = ("day", "key", "tenant", "model")

_COLUMNS = {
    "day": UsageDailyRow.day,
    "key": UsageDailyRow.key_id,
    "tenant": UsageDailyRow.tenant,
    "model": UsageDailyRow.model,
}
_SUMMED = (
    UsageDailyRow.requests,
    UsageDailyRow.cache_hits,
    UsageDailyRow.prompt_tokens,
    UsageDailyRow.cached_tokens,
    UsageDailyRow.output_tokens,
    UsageDailyRow.cost_micros,
)
# Spreadsheets run a cell that begins with one of these.
_FORMULA_STARTS = ("=", "+", "-", "@")


@dataclass(frozen=True, kw_only=True)
class UsageQuery:
    """None: all. `first` and `last` are days in UTC, both included. `by`: one row for each combination of these."""

    tenant: str | None = None
    key: str | None = None
    model: str | None = None
    first: datetime.date | None = None
    last: datetime.date | None = None
    by: tuple[Grouping, ...] = ("day",)


class UsageSums(msgspec.Struct, frozen=True):
    """`cache_hits`: requests that another request's answer served, finished or still running. `prompt_tokens` contain `cached_tokens`."""

    requests: int = 0
    cache_hits: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    cost_micros: int = 0

    @property
    def cost(self) -> Decimal:
        """In the currency of the price table, exact to six decimals."""
        return Decimal(self.cost_micros).scaleb(-6).quantize(Decimal(1) / MICROS)


@dataclass(frozen=True, slots=True)
class UsageReport:
    """`rows`: the values of `by`, and their sums; in the order of the values."""

    by: tuple[Grouping, ...]
    rows: list[tuple[tuple[str, ...], UsageSums]]
    currency: str | None = None

    @property
    def total(self) -> UsageSums:
        """Over all rows."""
        names = UsageSums.__struct_fields__
        return UsageSums(*(sum(getattr(sums, name) for _, sums in self.rows) for name in names))


async def read_usage(database: Database, query: UsageQuery, *, currency: str | None = None) -> UsageReport:
    """The sums that the database has now; servers write theirs within a second. Raises StoreUnavailableError."""
    async with database.read() as connection:
        found = list(await connection.execute(_statement(query)))
    width = len(query.by)
    return UsageReport(
        by=query.by,
        # PostgreSQL's sums of integers are decimals.
        rows=[(tuple(map(str, row[:width])), UsageSums(*map(int, row[width:]))) for row in found],
        currency=currency,
    )


def as_table(report: UsageReport) -> str:
    """Aligned text with a line of totals."""
    if not report.rows:
        return "No usage."
    cost = f"cost {report.currency}" if report.currency else "cost"
    header = [*report.by, "requests", "cache hits", "prompt tokens", "cached", "output tokens", cost]
    lines = [[*(one_line(value) or "-" for value in group), *_numbers(sums)] for group, sums in report.rows]
    total = ["total", *[""] * (len(report.by) - 1), *_numbers(report.total)]
    widths = [max(len(line[column]) for line in (header, *lines, total)) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(_aligned(line, widths, len(report.by)) for line in (header, rule, *lines, rule, total))


def as_csv(report: UsageReport) -> str:
    """A header and one line per row, without totals. Text that a spreadsheet would run as a formula begins with an apostrophe."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*report.by, *UsageSums.__struct_fields__[:-1], "cost"])
    for group, sums in report.rows:
        writer.writerow([*map(_inert, group), *msgspec.structs.astuple(sums)[:-1], sums.cost])
    return file.getvalue()


def as_json(report: UsageReport) -> str:
    """{"currency", "rows", "total"}; costs are decimal texts, because a float would not be exact."""
    rows = [{**dict(zip(report.by, group, strict=True)), **_fields(sums)} for group, sums in report.rows]
    content = {"currency": report.currency, "rows": rows, "total": _fields(report.total)}
    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode()


def _statement(query: UsageQuery) -> Select[*tuple[Any, ...]]:
    groups = [_COLUMNS[name] for name in query.by]
    statement = select(*groups, *(func.sum(column) for column in _SUMMED)).group_by(*groups).order_by(*groups)
    for column, wanted in (
        (UsageDailyRow.tenant, query.tenant),
        (UsageDailyRow.key_id, query.key),
        (UsageDailyRow.model, query.model),
    ):
        if wanted is not None:
            statement = statement.where(column == wanted)
    if query.first is not None:
        statement = statement.where(UsageDailyRow.day >= query.first)
    if query.last is not None:
        statement = statement.where(UsageDailyRow.day <= query.last)
    return statement


def _fields(sums: UsageSums) -> dict[str, object]:
    return {
        **dict(zip(sums.__struct_fields__[:-1], msgspec.structs.astuple(sums), strict=False)),
        "cost": str(sums.cost),
    }


def _numbers(sums: UsageSums) -> list[str]:
    return [*(f"{number:,}" for number in msgspec.structs.astuple(sums)[:-1]), f"{sums.cost:,}"]


def _aligned(line: Sequence[str], widths: Sequence[int], texts: int) -> str:
    cells = (
        cell.ljust(width) if column < texts else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    return "  ".join(cells).rstrip()


def _inert(value: str) -> str:
    value = one_line(value)
    return f"'{value}" if value.startswith(_FORMULA_STARTS) else value
