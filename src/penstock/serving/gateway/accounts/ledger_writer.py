"""Usage in the database: every request id counts once, sums per key, tenant, model and day (UTC).

One transaction per batch inserts the request ids that are not known yet into usage_seen and adds their usage, and only theirs, to
usage_daily. A batch that is written again after a lost acknowledgement finds its ids and adds nothing. Every process touches
ids and sums in the same order, so that two of them do not wait for each other in a circle. Ids are forgotten after seven days.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from sqlalchemy import Insert, delete, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from penstock.core.errors import StoreUnavailableError
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.accounts.database import Database, reason_of
from penstock.serving.gateway.accounts.interface import UsageRecord
from penstock.serving.gateway.accounts.ledger import BadRecordError, UsageLedger
from penstock.serving.gateway.accounts.prices import FREE, PricedUsage, load_prices
from penstock.serving.gateway.accounts.spool import SpoolFolder
from penstock.serving.gateway.accounts.tables import UsageDailyRow, UsageSeenRow
from penstock.telemetry.recorder import Recorder

KEEP_SEEN_S = 7 * 86400.0
_PRUNED_ROWS = 1000
# Bounds what one round of housekeeping deletes; the next one goes on.
_PRUNED_BATCHES = 100
_MIB = 1 << 20
# SQLSTATE: the data are wrong, a constraint does not hold, a limit of the program is exceeded.
_BAD_DATA_CLASSES = ("22", "23", "54")
_SUMS = ("requests", "cache_hits", "prompt_tokens", "cached_tokens", "output_tokens", "cost_micros")

# The ids come as one JSON text: one statement for batches of every size, prepared once.
_INSERT_SEEN = {
    "sqlite": "SELECT value, CAST(:now AS REAL) FROM json_each(:ids) WHERE true",
    "postgresql": "SELECT id, CAST(:now AS double precision) FROM json_array_elements_text(CAST(:ids AS json)) AS id",
}


class LedgerWriter:
    """The ledger's BatchWriter for a database. `clock` gives Unix time."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        dialect = "sqlite" if database.is_sqlite else "postgresql"
        self._insert_seen = text(
            f"INSERT INTO usage_seen (request_id, recorded_at) {_INSERT_SEEN[dialect]} "
            "ON CONFLICT DO NOTHING RETURNING request_id"
        )
        self._add_to_daily = _add_to_daily(database.is_sqlite)

    async def write(self, batch: Sequence[PricedUsage]) -> int:
        """See BatchWriter."""
        async with self._transaction() as connection:
            return await self._count(connection, batch)

    async def housekeeping(self) -> None:
        """See BatchWriter: forget request ids that are older than seven days."""
        oldest = self._clock() - KEEP_SEEN_S
        for _ in range(_PRUNED_BATCHES):
            if await self._prune(oldest) < _PRUNED_ROWS:
                return

    async def _count(self, connection: AsyncConnection, batch: Sequence[PricedUsage]) -> int:
        by_id = {item.usage.request_id: item for item in reversed(batch)}
        ids = msgspec.json.encode(sorted(by_id)).decode()
        result = await connection.execute(self._insert_seen, {"ids": ids, "now": self._clock()})
        new = [by_id[request_id] for request_id in result.scalars()]
        if new:
            await connection.execute(self._add_to_daily, daily_sums(new))
        return len(new)

    async def _prune(self, oldest: float) -> int:
        # Another process that prunes at the same time takes other rows.
        old = select(UsageSeenRow.request_id).where(UsageSeenRow.recorded_at < oldest).limit(_PRUNED_ROWS)
        statement = delete(UsageSeenRow).where(UsageSeenRow.request_id.in_(old.with_for_update(skip_locked=True)))
        async with self._transaction() as connection:
            return (await connection.execute(statement)).rowcount

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[AsyncConnection]:
        """The message of an error is for the log, in one line and without statements and their parameters."""
        try:
            async with self._database.write() as connection:
                yield connection
        except StoreUnavailableError as error:
            raise StoreUnavailableError(reason_of(error)) from None
        except (DataError, IntegrityError, ValueError, OverflowError) as error:
            raise BadRecordError(_first_line(error)) from None
        except SQLAlchemyError as error:
            state = str(getattr(getattr(error, "orig", None), "sqlstate", None) or "")
            if state[:2] in _BAD_DATA_CLASSES:
                raise BadRecordError(_first_line(error)) from None
            raise StoreUnavailableError(f"{self._database.name}: {_first_line(error)}") from None


def build_ledger(settings: GatewayConfig, database: Database, recorder: Recorder) -> UsageLedger:
    """The ledger that the settings ask for, not started. Raises ConfigError for a price table that cannot be used."""
    limit_bytes = int(settings.usage_spool_mib * _MIB)
    return UsageLedger(
        LedgerWriter(database),
        recorder,
        prices=load_prices(settings.price_table) if settings.price_table else FREE,
        spools=SpoolFolder(spool_folder(database), limit_bytes) if limit_bytes else None,
    )


def spool_folder(database: Database) -> Path:
    """Where usage for this database waits: beside a SQLite file, else in the user's data folder. One folder per database, because
    whoever finds a spool there writes it into its own."""
    if database.is_sqlite:
        return Path(f"{database.url.database}-spool").absolute()
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "penstock"
    return data / f"usage-spool-{hashlib.sha256(database.name.encode()).hexdigest()[:16]}"


def daily_sums(items: Iterable[PricedUsage]) -> list[dict[str, object]]:
    """Rows to add to usage_daily, in the order of their primary keys."""
    sums: dict[tuple[str, str, str, datetime.date], list[int]] = {}
    for item in items:
        usage = item.usage
        row = sums.setdefault((usage.key_id, usage.tenant, usage.model, day_of(usage)), [0] * len(_SUMS))
        # An answer that another request paid for is a hit, whether it was finished or still running.
        hit = usage.cache in ("hit", "coalesced")
        values = (1, hit, usage.prompt_tokens, usage.cached_tokens, usage.output_tokens, item.cost_micros)
        for index, value in enumerate(values):
            row[index] += value
    return [
        {"key_id": key, "tenant": tenant, "model": model, "day": day, **dict(zip(_SUMS, row, strict=True))}
        for (key, tenant, model, day), row in sorted(sums.items())
    ]


def day_of(usage: UsageRecord) -> datetime.date:
    """The day in UTC on which a request ended."""
    return datetime.datetime.fromtimestamp(usage.at, datetime.UTC).date()


def _add_to_daily(is_sqlite: bool) -> Insert:
    insert = sqlite.insert(UsageDailyRow) if is_sqlite else postgresql.insert(UsageDailyRow)
    return insert.on_conflict_do_update(
        index_elements=["key_id", "tenant", "model", "day"],
        set_={name: getattr(UsageDailyRow, name) + insert.excluded[name] for name in _SUMS},
    )


def _first_line(error: Exception) -> str:
    """The driver's own words, without the statement and its parameters."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
