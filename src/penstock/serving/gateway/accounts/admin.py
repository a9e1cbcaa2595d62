"""Making, listing, rotating and revoking keys, and limits of tenants: what `penstock keys` and /admin/keys both do.

Values are checked here, for both. Every change is one log line with its actor and the key's id. A secret leaves once, in what `create`
and `rotate` return. What changes here holds in every gateway within two seconds (directory.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from penstock.core.errors import InvalidRequestError, NotFoundError
from penstock.core.log import one_line
from penstock.serving.gateway.accounts.database import Database
from penstock.serving.gateway.accounts.keys import NewKey, is_key_id, new_key
from penstock.serving.gateway.accounts.rules import KeySettings, TenantSettings, check_tenant_name, is_tenant_name
from penstock.serving.gateway.accounts.tables import KeyRow, TenantRow, UsageDailyRow
from penstock.serving.gateway.identity import Role

logger = logging.getLogger(__name__)

MAX_PAGE = 1000
MAX_GRACE_S = 30 * 86400.0
# Marks the keys that came from --admin-key-file (admin_key_file.py).
FILE_LABEL = "from --admin-key-file"
_KEYS = KeyRow.__table__
_TENANTS = TenantRow.__table__


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyInfo:
    """A key as lists show it: everything but the secret. Times are Unix seconds. `spent_micros`: what the chain of rotations that the key
    belongs to has cost, which the budget is compared with."""

    id: str
    tenant: str
    role: Role
    settings: KeySettings
    created_at: float
    revoked_at: float | None
    replaced_by: str | None
    spent_micros: int

    def state(self, now: float) -> str:
        """active, expired, revoked, or rotated while the grace time of a rotation runs."""
        if self.revoked_at is not None:
            return "rotated" if self.revoked_at > now else "revoked"
        expires_at = self.settings.expires_at
        return "expired" if expires_at is not None and expires_at <= now else "active"


@dataclass(frozen=True, slots=True)
class CreatedKey:
    """`token` is what the client sends. It cannot be had again."""

    token: str = field(repr=False)
    info: KeyInfo


@dataclass(frozen=True, slots=True)
class TenantInfo:
    name: str
    settings: TenantSettings
    created_at: float


class KeyAdmin:
    """Changes accounts. `actor` in its methods is who asks, for the log: "cli", or an admin key's id."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    async def create(
        self,
        tenant: str,
        role: Role = "user",
        settings: KeySettings | None = None,
        *,
        actor: str,
        key: NewKey | None = None,
    ) -> CreatedKey:
        """A new key; its tenant is made when it does not exist. `key`: id and secret that exist already. Raises InvalidRequestError,
        StoreUnavailableError."""
        settings = settings or KeySettings()
        now = self._clock()
        check_tenant_name(tenant)
        settings.check(now)
        if key is None:
            if settings.label == FILE_LABEL:
                raise InvalidRequestError(f"The label {FILE_LABEL!r} is reserved.", param="label", code="invalid_value")
            key = new_key()
        values = {
            **settings.columns(),
            "id": key.key_id,
            "tenant": tenant,
            "secret_hash": key.secret_hash,
            "role": "admin" if role == "admin" else "user",
            "created_at": now,
            "lineage": key.key_id,
        }
        async with self._database.write() as connection:
            await self._ensure_tenant(connection, tenant, now)
            await connection.execute(insert(KeyRow).values(values))
            info = await self._show(connection, key.key_id)
        _log(actor, "created", key.key_id, f"tenant {tenant}, role {info.role}")
        return CreatedKey(key.token, info)

    async def keys(self, tenant: str | None = None, *, after: str = "", limit: int = MAX_PAGE) -> list[KeyInfo]:
        """Up to `limit` keys in the order of their ids, behind the id `after` ("": from the first). Raises InvalidRequestError."""
        if after and not is_key_id(after):
            raise InvalidRequestError("'after' must be the id of a key.", param="after", code="invalid_value")
        if tenant is not None and not is_tenant_name(tenant):
            return []
        statement = _select().where(_KEYS.c.id > after).order_by(_KEYS.c.id).limit(min(max(limit, 1), MAX_PAGE))
        if tenant is not None:
            statement = statement.where(_KEYS.c.tenant == tenant)
        async with self._database.read() as connection:
            return [_info(row) for row in await connection.execute(statement)]

    async def show(self, key_id: str) -> KeyInfo:
        """One key. Raises NotFoundError."""
        async with self._database.read() as connection:
            return await self._show(connection, key_id)

    async def has_secret(self, key_id: str, secret_hash: bytes) -> bool:
        """Whether a key exists with this secret, usable or not."""
        statement = select(_KEYS.c.id).where(_KEYS.c.id == key_id, _KEYS.c.secret_hash == secret_hash)
        async with self._database.read() as connection:
            return (await connection.execute(statement)).first() is not None

    async def any_usable(self) -> bool:
        """Whether a key exists that is neither revoked nor expired."""
        now = self._clock()
        ends = (_KEYS.c.revoked_at, _KEYS.c.expires_at)
        alive = [or_(end.is_(None), end > now) for end in ends]
        statement = select(_KEYS.c.id).where(*alive).limit(1)
        async with self._database.read() as connection:
            return (await connection.execute(statement)).first() is not None

    async def revoke(self, key_id: str, *, actor: str) -> KeyInfo:
        """End a key now, for good. A key that is revoked already stays as it is. Raises NotFoundError."""
        now = self._clock()
        async with self._database.write() as connection:
            info = await self._show(connection, key_id, lock=True)
            if info.revoked_at is None or info.revoked_at > now:
                await connection.execute(update(KeyRow).where(KeyRow.id == key_id).values(revoked_at=now))
                info = await self._show(connection, key_id)
        _log(actor, "revoked", key_id, f"tenant {info.tenant}")
        return info

    async def rotate(self, key_id: str, *, actor: str, grace_s: float = 0.0, key: NewKey | None = None) -> CreatedKey:
        """A new key with the settings of an old one, which ends after `grace_s`. The budget goes on: both keys' usage counts against it.

        Raises NotFoundError, and InvalidRequestError for a key that has ended or was rotated already.
        """
        if not 0 <= grace_s <= MAX_GRACE_S:
            raise InvalidRequestError(f"The grace time must be between 0 and {MAX_GRACE_S:.0f} seconds.", param="grace")
        now = self._clock()
        key = new_key()
        async with self._database.write() as connection:
            old = await self._show(connection, key_id, lock=True)
            state = old.state(now)
            if state != "active":
                raise InvalidRequestError(
                    f"The key {key_id} is {state}; only an active key can be rotated.", param="id"
                )
            copied = [column.name for column in _KEYS.c if column.name not in ("id", "secret_hash", "created_at")]
            row = (
                await connection.execute(select(*(_KEYS.c[name] for name in copied)).where(_KEYS.c.id == key_id))
            ).one()
            values = dict(zip(copied, row, strict=True))
            if old.settings.label == FILE_LABEL:
                # The next start would take it for an earlier secret of the file.
                values["label"] = ""
            values |= {"id": key.key_id, "secret_hash": key.secret_hash, "created_at": now}
            await connection.execute(insert(KeyRow).values(values))
            await connection.execute(
                update(KeyRow).where(KeyRow.id == key_id).values(revoked_at=now + grace_s, replaced_by=key.key_id)
            )
            info = await self._show(connection, key.key_id)
        _log(actor, "rotated", key_id, f"to {key.key_id}, grace {grace_s:g} s")
        return CreatedKey(key.token, info)

    async def tenants(self) -> list[TenantInfo]:
        """All tenants by name, up to MAX_PAGE."""
        async with self._database.read() as connection:
            rows = await connection.execute(select(_TENANTS).order_by(_TENANTS.c.name).limit(MAX_PAGE))
            return [_tenant(row) for row in rows]

    async def tenant(self, name: str) -> TenantInfo:
        """One tenant. Raises NotFoundError."""
        row = None
        if is_tenant_name(name):
            async with self._database.read() as connection:
                row = (await connection.execute(select(_TENANTS).where(_TENANTS.c.name == name))).one_or_none()
        if row is None:
            raise NotFoundError("There is no such tenant.", param="tenant", code="tenant_not_found")
        return _tenant(row)

    async def set_tenant(self, name: str, settings: TenantSettings, *, actor: str) -> TenantInfo:
        """Replace the settings of a tenant, which is made when it does not exist. Raises InvalidRequestError."""
        check_tenant_name(name)
        settings.check()
        async with self._database.write() as connection:
            await self._ensure_tenant(connection, name, self._clock())
            await connection.execute(update(TenantRow).where(TenantRow.name == name).values(settings.columns()))
            row = (await connection.execute(select(_TENANTS).where(_TENANTS.c.name == name))).one()
        logger.info("%s changed tenant %s: %s", one_line(actor), name, settings)
        return _tenant(row)

    async def _ensure_tenant(self, connection: AsyncConnection, name: str, now: float) -> None:
        upsert: Any = sqlite.insert(TenantRow) if self._database.is_sqlite else postgresql.insert(TenantRow)
        await connection.execute(upsert.values(name=name, created_at=now).on_conflict_do_nothing())

    async def _show(self, connection: AsyncConnection, key_id: str, *, lock: bool = False) -> KeyInfo:
        """`lock`: until the end of the transaction nobody else changes the key (SQLite has one writer anyway)."""
        row = None
        # Whatever cannot be an id is not asked for; what a caller typed is not repeated.
        if is_key_id(key_id):
            statement = _select().where(_KEYS.c.id == key_id)
            if lock:
                statement = statement.with_for_update(of=_KEYS)
            row = (await connection.execute(statement)).one_or_none()
        if row is None:
            raise NotFoundError("There is no such key.", param="id", code="key_not_found")
        return _info(row)


def _select() -> Any:
    chain = _KEYS.alias()
    spent = (
        select(func.coalesce(func.sum(UsageDailyRow.cost_micros), 0))
        .join(chain, chain.c.id == UsageDailyRow.key_id)
        .where(chain.c.lineage == _KEYS.c.lineage)
        .correlate(_KEYS)
        .scalar_subquery()
    )
    return select(_KEYS, spent.label("spent_micros"))


def _info(row: Row[*tuple[Any, ...]]) -> KeyInfo:
    return KeyInfo(
        id=row.id,
        tenant=row.tenant,
        role="admin" if row.role == "admin" else "user",
        settings=KeySettings(
            label=row.label,
            models=None if row.models is None else tuple(row.models),
            rpm=row.rpm,
            tpm=row.tpm,
            concurrency=row.concurrency,
            priority=row.priority,
            weight=row.weight,
            budget_micros=row.budget_micros,
            expires_at=row.expires_at,
        ),
        created_at=row.created_at,
        revoked_at=row.revoked_at,
        replaced_by=row.replaced_by,
        spent_micros=int(row.spent_micros),
    )


def _tenant(row: Row[*tuple[Any, ...]]) -> TenantInfo:
    return TenantInfo(row.name, TenantSettings(row.rpm, row.tpm, row.concurrency, row.weight), row.created_at)


def _log(actor: str, action: str, key_id: str, more: str) -> None:
    logger.info("%s %s key %s (%s)", one_line(actor), action, key_id, more)
