"""What the key directory asks the database, and the identity that a row stands for."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import msgspec
from sqlalchemy import Row, bindparam, case, func, literal, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import aliased

from penstock.serving.gateway.accounts.interface import KeyEntry
from penstock.serving.gateway.accounts.tables import KeyRow, TenantRow, UsageDailyRow
from penstock.serving.gateway.identity import Identity, RateLimits

_CHAIN = aliased(KeyRow)
# What all keys of a chain of rotations have cost; asked for only where there is a budget.
_SPENT = (
    select(func.coalesce(func.sum(UsageDailyRow.cost_micros), 0))
    .join(_CHAIN, _CHAIN.id == UsageDailyRow.key_id)
    .where(_CHAIN.lineage == KeyRow.lineage)
    .correlate(KeyRow)
    .scalar_subquery()
)
_KEYS = (
    select(
        KeyRow.id,
        KeyRow.tenant,
        KeyRow.secret_hash,
        KeyRow.role,
        KeyRow.models,
        KeyRow.rpm,
        KeyRow.tpm,
        KeyRow.concurrency,
        KeyRow.priority,
        KeyRow.weight,
        KeyRow.expires_at,
        KeyRow.revoked_at,
        TenantRow.rpm.label("tenant_rpm"),
        TenantRow.tpm.label("tenant_tpm"),
        TenantRow.concurrency.label("tenant_concurrency"),
        TenantRow.weight.label("tenant_weight"),
        case((KeyRow.budget_micros.is_(None), literal(False)), else_=KeyRow.budget_micros <= _SPENT).label(
            "over_budget"
        ),
    )
    .join(TenantRow, TenantRow.name == KeyRow.tenant)
    .where(KeyRow.id.in_(bindparam("ids", expanding=True)))
)
_ADMIN = (
    select(KeyRow.id)
    .where(
        KeyRow.role == "admin",
        or_(KeyRow.revoked_at.is_(None), KeyRow.revoked_at > bindparam("now")),
        or_(KeyRow.expires_at.is_(None), KeyRow.expires_at > bindparam("now")),
    )
    .limit(1)
)


class FoundKey(msgspec.Struct, frozen=True):
    """`ends_at`: when a key that is usable stops being so by itself (expiry, end of a grace time), Unix seconds."""

    entry: KeyEntry
    ends_at: float | None

    def at(self, now: float) -> KeyEntry:
        """The entry as it holds at a time after it was read."""
        if self.entry.usable and self.ends_at is not None and self.ends_at <= now:
            return msgspec.structs.replace(self.entry, usable=False)
        return self.entry


async def read_keys(connection: AsyncConnection, ids: Collection[str], now: float) -> dict[str, FoundKey]:
    """The keys among `ids` that exist, usable or not."""
    rows = await connection.execute(_KEYS, {"ids": list(ids)})
    return dict(_found(row, now) for row in rows)


async def read_any_admin(connection: AsyncConnection, now: float) -> bool:
    """Whether there is a usable admin key."""
    return (await connection.execute(_ADMIN, {"now": now})).first() is not None


def _found(row: Row[*tuple[Any, ...]], now: float) -> tuple[str, FoundKey]:
    ends = list(_known(row.expires_at, row.revoked_at))
    ends_at = min(ends) if ends else None
    key_weight = row.weight if row.weight is not None else row.tenant_weight
    identity = Identity(
        tenant=row.tenant,
        key_id=row.id,
        method="key",
        role="admin" if row.role == "admin" else "user",
        models=None if row.models is None else frozenset(row.models),
        key_limits=RateLimits(row.rpm, row.tpm, row.concurrency),
        tenant_limits=RateLimits(row.tenant_rpm, row.tenant_tpm, row.tenant_concurrency),
        priority=row.priority,
        weight=1.0 if key_weight is None else key_weight,
        over_budget=bool(row.over_budget),
    )
    entry = KeyEntry(
        key_id=row.id,
        secret_hash=bytes(row.secret_hash),
        usable=ends_at is None or ends_at > now,
        expires_at=row.expires_at,
        identity=identity,
    )
    return row.id, FoundKey(entry, ends_at)


def _known(*times: float | None) -> Iterator[float]:
    return (time for time in times if time is not None)
