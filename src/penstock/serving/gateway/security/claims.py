"""From the claims of a verified JWT to an Identity.

The operator signs tokens, so what they say holds; but a claim that is not understood refuses the token instead of granting what a missing
claim would (a limit of the wrong type is not "no limit").
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.identity import NO_LIMITS, Identity, RateLimits, Role

MAX_MODELS = 256
_MAX_MODEL_NAME = 256
_MAX_LIMIT = 10**12
_MAX_PRIORITY = 1_000_000
# As accounts name tenants.
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:-]{0,127}")
_SUBJECT = re.compile(r"[A-Za-z0-9._@:|-]{1,48}")
_LIMITS = {"rpm": "requests_per_minute", "tpm": "tokens_per_minute", "concurrency": "concurrency"}


class ClaimError(ValueError):
    """A claim is missing or cannot be understood. The message is for the operator's log and never holds a value."""


@dataclass(frozen=True, slots=True)
class ClaimMapping:
    """Which claims mean what."""

    tenant: str = "tenant"
    role: str = "role"
    limits: str = "limits"

    @classmethod
    def of(cls, config: GatewayConfig) -> ClaimMapping:
        """As configured."""
        return cls(config.jwt_tenant_claim, config.jwt_role_claim, config.jwt_limits_claim)


DEFAULT_MAPPING = ClaimMapping()


def identity_of(claims: Mapping[str, Any], mapping: ClaimMapping) -> Identity:
    """Who the token speaks for. Raises ClaimError."""
    tenant = find_claim(claims, mapping.tenant)
    if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
        raise ClaimError(f"the claim {mapping.tenant} is not a tenant's name")
    return Identity(
        tenant=tenant,
        key_id=_key_id(claims.get("sub"), tenant),
        method="jwt",
        role=_role(find_claim(claims, mapping.role), mapping.role),
        models=_models(claims.get("models")),
        key_limits=_limits(find_claim(claims, mapping.limits), mapping.limits),
        priority=_priority(claims.get("priority")),
    )


def find_claim(claims: Mapping[str, Any], name: str) -> Any:
    """The claim of exactly this name (names may be URLs, with dots in them), else the one that the dots lead to; None without."""
    if name in claims:
        return claims[name]
    found: Any = claims
    for part in name.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def _key_id(subject: Any, tenant: str) -> str:
    """What limits and usage are counted under. A subject that is long or strange is hashed; without one, all such tokens of
    the tenant count as one."""
    if subject is None:
        return f"jwt:#{_digest(tenant)}"
    if not isinstance(subject, str):
        raise ClaimError("the claim sub is not a string")
    return f"jwt:{subject}" if _SUBJECT.fullmatch(subject) else f"jwt:#{_digest('sub ' + subject)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _role(value: Any, name: str) -> Role:
    """Identity providers have roles of their own beside ours; whatever is not admin is a user."""
    if value is None or isinstance(value, str):
        return "admin" if value == "admin" else "user"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "admin" if "admin" in value else "user"
    raise ClaimError(f"the claim {name} is neither a string nor a list of strings")


def _limits(value: Any, name: str) -> RateLimits:
    if value is None:
        return NO_LIMITS
    if not isinstance(value, dict):
        raise ClaimError(f"the claim {name} is not an object")
    limits: dict[str, int] = {}
    for claim, field in _LIMITS.items():
        limit = value.get(claim)
        if limit is None:
            continue
        if type(limit) is not int or not 1 <= limit <= _MAX_LIMIT:
            raise ClaimError(f"{claim} of the claim {name} is not a positive integer")
        limits[field] = limit
    return RateLimits(**limits)


def _models(value: Any) -> frozenset[str] | None:
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) > MAX_MODELS
        or not all(isinstance(model, str) and len(model) <= _MAX_MODEL_NAME for model in value)
    ):
        raise ClaimError("the claim models is not a list of names")
    return frozenset(value)


def _priority(value: Any) -> int:
    """Only what makes requests less urgent; a token cannot put itself in front."""
    return min(value, _MAX_PRIORITY) if type(value) is int and value > 0 else 0
