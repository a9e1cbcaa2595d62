"""The tables of accounts and usage; migrations/ makes a database look like this.

Money is in millionths of the currency (`*_micros`) and times are Unix seconds, so that SQLite and PostgreSQL agree to the last digit.
Ids, tenants and models of usage are plain text without foreign keys: usage of a JWT or of a tenant that is gone still counts.
"""

from __future__ import annotations

import datetime

from sqlalchemy import JSON, BigInteger, Date, Double, ForeignKey, Integer, LargeBinary, MetaData, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Names of constraints and indexes are fixed, so that migrations can speak of them on every database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class TenantRow(Base):
    """Limits that all keys of a tenant share; NULL: no limit. `weight`: the tenant's share of a busy engine (NULL: 1)."""

    __tablename__ = "tenants"

    name: Mapped[str] = mapped_column(String, primary_key=True)
    rpm: Mapped[int | None] = mapped_column(BigInteger)
    tpm: Mapped[int | None] = mapped_column(BigInteger)
    concurrency: Mapped[int | None] = mapped_column(BigInteger)
    weight: Mapped[float | None] = mapped_column(Double)
    created_at: Mapped[float] = mapped_column(Double)


class KeyRow(Base):
    """An API key. `secret_hash`: SHA-256 of the secret. `models`: names that may be used (NULL: all). `revoked_at` may lie in the future
    (the grace time of a rotation). `replaced_by`: the key that rotation made of it. `lineage`: the first key of a chain of rotations; a
    budget counts the usage of the whole chain."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String, primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), index=True)
    label: Mapped[str] = mapped_column(String)
    secret_hash: Mapped[bytes] = mapped_column(LargeBinary(32))
    role: Mapped[str] = mapped_column(String)
    models: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    rpm: Mapped[int | None] = mapped_column(BigInteger)
    tpm: Mapped[int | None] = mapped_column(BigInteger)
    concurrency: Mapped[int | None] = mapped_column(BigInteger)
    priority: Mapped[int] = mapped_column(Integer)
    weight: Mapped[float | None] = mapped_column(Double)
    budget_micros: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[float] = mapped_column(Double)
    expires_at: Mapped[float | None] = mapped_column(Double)
    revoked_at: Mapped[float | None] = mapped_column(Double)
    replaced_by: Mapped[str | None] = mapped_column(String)
    lineage: Mapped[str] = mapped_column(String, index=True)


class UsageDailyRow(Base):
    """Sums of one key, tenant, model and day (UTC)."""

    __tablename__ = "usage_daily"

    key_id: Mapped[str] = mapped_column(String, primary_key=True)
    tenant: Mapped[str] = mapped_column(String, primary_key=True)
    model: Mapped[str] = mapped_column(String, primary_key=True)
    day: Mapped[datetime.date] = mapped_column(Date, primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    cache_hits: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    cached_tokens: Mapped[int] = mapped_column(BigInteger)
    output_tokens: Mapped[int] = mapped_column(BigInteger)
    cost_micros: Mapped[int] = mapped_column(BigInteger)


class UsageSeenRow(Base):
    """Requests that are counted already, kept for as long as a record may be written again."""

    __tablename__ = "usage_seen"

    request_id: Mapped[str] = mapped_column(String, primary_key=True)
    recorded_at: Mapped[float] = mapped_column(Double, index=True)
