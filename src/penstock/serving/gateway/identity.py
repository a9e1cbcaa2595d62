"""Who asks: the tenant, the key, and what they may do. Made by authentication, read by everything after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["user", "admin"]
Method = Literal["none", "key", "jwt"]


@dataclass(frozen=True, slots=True)
class RateLimits:
    """Limits of a key or a tenant; None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None


NO_LIMITS = RateLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """`key_id` is the look-up id of an API key, "jwt:<sub>" for a JWT, "" without authentication. `tenant` separates caches, limits and
    usage; "" is the one tenant of a server without authentication. `models`: names that may be used (None: all). `priority`: added to a
    request's own (lower is served first), which may not be below it. `weight`: the tenant's share of a busy engine. `over_budget`:
    nothing that costs may be done."""

    tenant: str
    key_id: str
    method: Method
    role: Role = "user"
    models: frozenset[str] | None = None
    key_limits: RateLimits = NO_LIMITS
    tenant_limits: RateLimits = NO_LIMITS
    priority: int = 0
    weight: float = 1.0
    over_budget: bool = False

    def may_use(self, model: str) -> bool:
        """Whether the model is allowed."""
        return self.models is None or model in self.models


ANONYMOUS = Identity(tenant="", key_id="", method="none")
