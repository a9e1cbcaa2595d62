"""From the credential of a request to an Identity, or to one answer that says nothing about what was wrong.

headers ─▶ credential_of ─▶ throttled? ─▶ two dots and JWT allowed ─▶ JwtVerifier
                                      └─▶ look-up id ─▶ KeyDirectory ─▶ SHA-256, compared in constant time
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Callable, Hashable
from typing import Literal, Protocol

from starlette.types import Scope

from penstock.core.errors import AuthenticationError, RateLimitError
from penstock.serving.gateway.accounts.interface import KeyDirectory, KeyEntry
from penstock.serving.gateway.accounts.keys import ID_LENGTH, PREFIX, parse_key, verify
from penstock.serving.gateway.identity import Identity
from penstock.serving.gateway.security.addresses import client_block
from penstock.serving.gateway.security.credentials import MalformedCredentialError, credential_of
from penstock.serving.gateway.security.tenants import TenantTerms
from penstock.serving.gateway.security.throttle import FailureThrottle
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder

# The label of AUTH_FAILURES. "role": a valid identity that may not do this.
Reason = Literal["missing", "malformed", "key", "token", "throttled", "role"]

# Whoever has the scrape token: may read /metrics and is no tenant.
SCRAPER = Identity(tenant="", key_id="metrics", method="key")

# A JWS in compact form. A key that an operator brought along is never taken for one unless it looks exactly so.
_TOKEN_SHAPE = re.compile(r"[A-Za-z0-9_-]+=*\.[A-Za-z0-9_-]*=*\.[A-Za-z0-9_-]*=*")
_REFUSAL = "A valid API key or token is needed: send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'."


class TokenVerifier(Protocol):
    """What verifies tokens (JwtVerifier)."""

    async def verify(self, token: str) -> Identity | None:
        """Who the token speaks for, None when it proves nothing. May raise StoreUnavailableError."""
        ...


class Authenticator:
    """`keys`, `jwt`: None where the method is not allowed. `tenants`: what holds for the tenants of tokens; None: nothing beyond the
    token. `scrape_token`: what /metrics takes. `clock` gives Unix time."""

    def __init__(
        self,
        keys: KeyDirectory | None,
        jwt: TokenVerifier | None,
        throttle: FailureThrottle,
        recorder: Recorder,
        *,
        tenants: TenantTerms | None = None,
        scrape_token: bytes | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._jwt = jwt
        self._tenants = tenants
        self._throttle = throttle
        self._recorder = recorder
        self._scrape_digest = hashlib.sha256(scrape_token).digest() if scrape_token is not None else None
        self._clock = clock

    @property
    def has_scrape_token(self) -> bool:
        """Whether /metrics has a token of its own."""
        return self._scrape_digest is not None

    def count(self, reason: Reason) -> None:
        """One more request refused."""
        self._recorder.increment(metrics.AUTH_FAILURES, reason)

    async def require(self, scope: Scope, *, scrape: bool = False) -> Identity:
        """As `identify`, with AuthenticationError also for a request without a credential."""
        identity = await self.identify(scope, scrape=scrape)
        if identity is None:
            self.count("missing")
            raise _refusal()
        return identity

    async def identify(self, scope: Scope, *, scrape: bool = False) -> Identity | None:
        """Who asks; None when the request has no credential. `scrape`: the scrape token counts too and gives SCRAPER.

        Raises AuthenticationError, RateLimitError for an address that failed too often (before anything is looked up), and
        StoreUnavailableError when it cannot be known now.
        """
        try:
            credential = credential_of(scope["headers"])
        except MalformedCredentialError:
            self.count("malformed")
            raise _refusal() from None
        if credential is None:
            return None
        client = scope.get("client")
        address = client_block(client[0]) if client else None
        label = _label(credential)
        wait_s = self._throttle.wait_s(address, label)
        if wait_s > 0:
            self.count("throttled")
            raise RateLimitError(
                "Too many failed attempts to authenticate. Wait before the next one.",
                retry_after_s=wait_s,
                code="too_many_failed_attempts",
            )
        if scrape and self._is_scrape_token(credential):
            return SCRAPER
        as_token = self._jwt is not None and _TOKEN_SHAPE.fullmatch(credential) is not None
        identity = await (self._identify_token(credential) if as_token else self._identify_key(credential))
        if identity is None:
            self._throttle.failed(address, label)
            self.count("token" if as_token else "key")
            raise _refusal()
        return identity

    def _is_scrape_token(self, credential: str) -> bool:
        if self._scrape_digest is None:
            return False
        return hmac.compare_digest(hashlib.sha256(credential.encode("ascii")).digest(), self._scrape_digest)

    async def _identify_token(self, token: str) -> Identity | None:
        identity = await self._jwt.verify(token) if self._jwt is not None else None
        return identity if identity is None or self._tenants is None else await self._tenants.apply(identity)

    async def _identify_key(self, credential: str) -> Identity | None:
        """The secret is hashed and compared whether the id is known or not, so that the time does not tell."""
        presented = parse_key(credential)
        if self._keys is None or presented is None:
            return None
        entry = await self._keys.find(presented.key_id)
        if not verify(presented, entry) or entry is None or self._expired(entry):
            return None
        return entry.identity

    def _expired(self, entry: KeyEntry) -> bool:
        return entry.expires_at is not None and self._clock() >= entry.expires_at


def _label(credential: str) -> Hashable:
    """What failures of this credential are counted under: the id in it, or Python's own salted hash; neither tells the secret, and
    neither costs anything."""
    return credential[: len(PREFIX) + ID_LENGTH] if credential.startswith(PREFIX) else hash(credential)


def _refusal() -> AuthenticationError:
    return AuthenticationError(_REFUSAL)
