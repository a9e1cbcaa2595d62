"""Accounts without a database: keys that a test makes, and usage that it reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.serving.gateway.accounts.interface import KeyEntry, UsageRecord
from penstock.serving.gateway.accounts.keys import new_key
from penstock.serving.gateway.identity import NO_LIMITS, Identity, RateLimits, Role


@dataclass
class FakeKeys:
    """A KeyDirectory. `lookups` counts questions."""

    entries: dict[str, KeyEntry] = field(default_factory=dict)
    lookups: int = 0

    def add(
        self,
        tenant: str,
        *,
        role: Role = "user",
        limits: RateLimits = NO_LIMITS,
        tenant_limits: RateLimits = NO_LIMITS,
        models: frozenset[str] | None = None,
        priority: int = 0,
        over_budget: bool = False,
        usable: bool = True,
    ) -> str:
        """Make a key; the token that a client sends."""
        key = new_key()
        identity = Identity(
            tenant=tenant,
            key_id=key.key_id,
            method="key",
            role=role,
            models=models,
            key_limits=limits,
            tenant_limits=tenant_limits,
            priority=priority,
            over_budget=over_budget,
        )
        self.entries[key.key_id] = KeyEntry(
            key_id=key.key_id, secret_hash=key.secret_hash, usable=usable, expires_at=None, identity=identity
        )
        return key.token

    async def find(self, key_id: str) -> KeyEntry | None:
        self.lookups += 1
        return self.entries.get(key_id)

    async def any_admin(self) -> bool:
        return any(entry.usable and entry.identity.role == "admin" for entry in self.entries.values())


@dataclass
class FakeUsage:
    """A UsageSink that keeps everything."""

    records: list[UsageRecord] = field(default_factory=list)

    def record(self, usage: UsageRecord) -> None:
        self.records.append(usage)
