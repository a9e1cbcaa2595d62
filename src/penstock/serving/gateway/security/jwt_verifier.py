"""Verifies JSON Web Tokens (RFC 7519) with one algorithm, fixed by configuration (RFC 8725)."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import jwt

from penstock.core.errors import ConfigError
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.identity import Identity
from penstock.serving.gateway.security.claims import DEFAULT_MAPPING, ClaimError, ClaimMapping, identity_of
from penstock.serving.gateway.security.jwks import Jwks, check_file, fetcher
from penstock.serving.gateway.security.startup import check_jwt, read_secret

logger = logging.getLogger(__name__)

MIN_SECRET_BYTES = 32
# A verified token is not verified again for so long; a key taken out of the JWKS works on for that time.
CACHE_S = 60.0
_MAX_CACHED = 4096
_MAX_KID = 256


class TokenRefusedError(Exception):
    """The token proves nothing. The text is for the operator's log, holds nothing of the token, and the client is not told it."""


class VerificationKeys(Protocol):
    """Where keys come from."""

    async def find(self, kid: str | None) -> Any:
        """The key that a token names, None without one. May raise StoreUnavailableError."""
        ...


class SharedSecret:
    """The one secret of HS256, whatever key a token names."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    async def find(self, kid: str | None) -> bytes:
        return self._secret


class JwtVerifier:
    """`keys` hold keys of the type that `algorithm` needs and no other. `clock` gives Unix time."""

    def __init__(
        self,
        keys: VerificationKeys,
        *,
        algorithm: str,
        issuer: str | None = None,
        audience: str | None = None,
        leeway_s: float = 30.0,
        mapping: ClaimMapping = DEFAULT_MAPPING,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._algorithm = algorithm
        self._issuer = issuer
        self._audience = audience
        self._leeway_s = leeway_s
        self._mapping = mapping
        self._clock = clock
        required = ["exp", *(["iss"] if issuer else []), *(["aud"] if audience else [])]
        self._options: Any = {
            "require": required,
            "verify_aud": audience is not None,
            "verify_iss": issuer is not None,
            "enforce_minimum_key_length": True,
        }
        self._cache: OrderedDict[bytes, tuple[Identity, float]] = OrderedDict()

    @property
    def cached(self) -> int:
        """Verified tokens that are remembered."""
        return len(self._cache)

    async def verify(self, token: str) -> Identity | None:
        """Who the token speaks for, None when it proves nothing. Raises StoreUnavailableError while there are no keys."""
        digest = hashlib.sha256(token.encode("ascii")).digest()
        cached = self._cache.get(digest)
        if cached is not None:
            identity, until = cached
            if self._clock() < until:
                self._cache.move_to_end(digest)
                return identity
            del self._cache[digest]
        try:
            claims = await self._decode(token)
            identity = identity_of(claims, self._mapping)
        except (TokenRefusedError, ClaimError) as error:
            logger.info("a token is refused: %s", error)
            return None
        self._remember(digest, identity, int(claims["exp"]))
        return identity

    async def _decode(self, token: str) -> dict[str, Any]:
        try:
            header = jwt.get_unverified_header(token)
            # Before the signature, so that no key is looked up for a token that cannot pass.
            if header.get("alg") != self._algorithm:
                raise TokenRefusedError("another algorithm")
            kid = header.get("kid")
            if kid is not None and len(kid) > _MAX_KID:
                raise TokenRefusedError("an endless kid")
            key = await self._keys.find(kid)
            if key is None:
                raise TokenRefusedError("an unknown kid")
            claims = jwt.decode(
                token,
                key,
                algorithms=[self._algorithm],
                options=self._options,
                audience=self._audience,
                issuer=self._issuer,
                leeway=self._leeway_s,
            )
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            # Anybody can send anything as a token; what a library did not foresee must not become a 500.
            raise TokenRefusedError(type(error).__name__) from None
        return claims

    def _remember(self, digest: bytes, identity: Identity, expires_at: int) -> None:
        now = self._clock()
        until = min(expires_at, now + CACHE_S)
        if until <= now:
            return
        self._cache[digest] = (identity, until)
        if len(self._cache) > _MAX_CACHED:
            self._cache.popitem(last=False)


def build_verifier(config: GatewayConfig, *, clock: Callable[[], float] = time.time) -> JwtVerifier:
    """The verifier that the settings describe. Raises ConfigError."""
    check_jwt(config)
    keys: VerificationKeys
    if config.jwt_algorithm == "HS256":
        if not config.jwt_secret_file:
            raise ConfigError("--jwt-algorithm HS256 needs --jwt-secret-file.")
        secret = read_secret("jwt_secret_file", config.jwt_secret_file, min_bytes=MIN_SECRET_BYTES)
        keys = SharedSecret(secret)
    else:
        if not config.jwt_jwks:
            raise ConfigError(f"--jwt-algorithm {config.jwt_algorithm} needs --jwt-jwks.")
        check_file(config.jwt_jwks, config.jwt_algorithm)
        keys = Jwks(fetcher(config.jwt_jwks), config.jwt_algorithm)
    return JwtVerifier(
        keys,
        algorithm=config.jwt_algorithm,
        issuer=config.jwt_issuer,
        audience=config.jwt_audience,
        leeway_s=config.jwt_leeway_s,
        mapping=ClaimMapping.of(config),
        clock=clock,
    )
