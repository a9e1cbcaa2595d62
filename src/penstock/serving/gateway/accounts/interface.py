"""What the gateway asks of accounts: an identity for a key, and a place to write usage to."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from penstock.serving.gateway.cache.interface import CacheOutcome
from penstock.serving.gateway.identity import Identity

UsageOutcome = Literal["completed", "cancelled", "failed"]


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One request that is charged (docs/accounting.md). `request_id` is ours and unique: writing a record twice counts it once.
    `at`: Unix time of its end. `cached_tokens` of `prompt_tokens` came from the prefix cache (all of them on a cache hit)."""

    request_id: str
    at: float
    key_id: str
    tenant: str
    model: str
    outcome: UsageOutcome
    cache: CacheOutcome
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


class UsageSink(Protocol):
    """Takes usage off the hot path."""

    def record(self, usage: UsageRecord) -> None:
        """Never blocks and never raises; what cannot be kept is counted and logged."""
        ...


class KeyDirectory(Protocol):
    """API keys as authentication sees them."""

    async def find(self, key_id: str) -> KeyEntry | None:
        """The key, None when there is none. At most a second old, so that a revocation holds everywhere within two.
        Raises StoreUnavailableError when the database is away and nothing recent enough is known."""
        ...

    async def any_admin(self) -> bool:
        """Whether an admin key that can be used exists; admin routes are off otherwise. May be a second old."""
        ...


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True):
    """`secret_hash`: SHA-256 of the secret part. `usable`: neither revoked nor expired. `identity` is what the key stands for."""

    key_id: str
    secret_hash: bytes
    usable: bool
    expires_at: float | None
    identity: Identity
