"""Bodies and answers of /admin: keys and tenants. `penstock keys --json` prints the same objects. Nothing here loads a database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import UNSET, Struct, UnsetType
from pydantic import Field

from penstock.serving.gateway.accounts.keys import shown_prefix
from penstock.serving.gateway.accounts.rules import (
    MAX_LABEL,
    MAX_LIMIT,
    MAX_MODELS,
    MAX_PRIORITY,
    MAX_WEIGHT,
    MIN_WEIGHT,
    KeySettings,
    TenantSettings,
    parse_budget,
    parse_duration,
    parse_expiry,
    show_money,
)
from penstock.serving.gateway.identity import Role
from penstock.serving.gateway.schemas.base import ModelName, RequestModel, at_most

if TYPE_CHECKING:
    from penstock.serving.gateway.accounts.admin import KeyInfo, TenantInfo

Limit = Annotated[int, Field(ge=1, le=MAX_LIMIT)]
Weight = Annotated[float, Field(ge=MIN_WEIGHT, le=MAX_WEIGHT)]


class CreateKeyBody(RequestModel):
    """`budget`: a number, or exactly as text ("12.50"). `expires`: a duration from now (30d) or a date or time (2027-01-01)."""

    tenant: Annotated[str, Field(min_length=1, max_length=128)]
    role: Literal["user", "admin"] = "user"
    label: Annotated[str, Field(max_length=MAX_LABEL)] = ""
    models: Annotated[list[ModelName], Field(min_length=1), at_most(MAX_MODELS)] | None = None
    rpm: Limit | None = None
    tpm: Limit | None = None
    concurrency: Limit | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    weight: Weight | None = None
    budget: str | int | float | None = None
    expires: str | None = None

    def settings(self, now: float) -> KeySettings:
        """What the key is to be. Raises InvalidRequestError."""
        return KeySettings(
            label=self.label,
            models=None if self.models is None else tuple(self.models),
            rpm=self.rpm,
            tpm=self.tpm,
            concurrency=self.concurrency,
            priority=self.priority,
            weight=self.weight,
            budget_micros=None if self.budget is None else parse_budget(str(self.budget)),
            expires_at=None if self.expires is None else parse_expiry(self.expires, now),
        )


class RotateKeyBody(RequestModel):
    """`grace`: how long the old key still works, such as 10m; without it, not at all."""

    grace: str = "0s"

    def grace_s(self) -> float:
        return parse_duration(self.grace, "grace")


class TenantBody(RequestModel):
    """All settings of a tenant: what is left out is not limited."""

    rpm: Limit | None = None
    tpm: Limit | None = None
    concurrency: Limit | None = None
    weight: Weight | None = None

    def settings(self) -> TenantSettings:
        return TenantSettings(self.rpm, self.tpm, self.concurrency, self.weight)


class KeyObject(Struct, kw_only=True):
    """A key. `key`, the secret, is there only in the answer that made it. Money as text, exact; times in Unix seconds. `spent`: cost so
    far of this key and of those that it was rotated from."""

    id: str
    object: Literal["key"] = "key"
    key: str | UnsetType = UNSET
    key_prefix: str
    tenant: str
    role: Role
    state: str
    label: str
    models: tuple[str, ...] | None
    rpm: int | None
    tpm: int | None
    concurrency: int | None
    priority: int
    weight: float | None
    budget: str | None
    spent: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    replaced_by: str | None


class KeyList(Struct):
    """Keys in the order of their ids. `next`: the `after` of the next page; null on the last."""

    data: list[KeyObject]
    next: str | None
    object: Literal["list"] = "list"


class TenantObject(Struct):
    name: str
    rpm: int | None
    tpm: int | None
    concurrency: int | None
    weight: float | None
    created_at: float
    object: Literal["tenant"] = "tenant"


class TenantList(Struct):
    data: list[TenantObject]
    object: Literal["list"] = "list"


def key_object(info: KeyInfo, now: float, token: str | None = None) -> KeyObject:
    """A key as others see it; `token` only for who made it."""
    settings = info.settings
    return KeyObject(
        id=info.id,
        key=UNSET if token is None else token,
        key_prefix=shown_prefix(info.id),
        tenant=info.tenant,
        role=info.role,
        state=info.state(now),
        label=settings.label,
        models=settings.models,
        rpm=settings.rpm,
        tpm=settings.tpm,
        concurrency=settings.concurrency,
        priority=settings.priority,
        weight=settings.weight,
        budget=None if settings.budget_micros is None else show_money(settings.budget_micros),
        spent=show_money(info.spent_micros),
        created_at=info.created_at,
        expires_at=settings.expires_at,
        revoked_at=info.revoked_at,
        replaced_by=info.replaced_by,
    )


def tenant_object(info: TenantInfo) -> TenantObject:
    settings = info.settings
    return TenantObject(info.name, settings.rpm, settings.tpm, settings.concurrency, settings.weight, info.created_at)
