"""Public keys that verify tokens: a JWKS (RFC 7517) in a file or behind the operator's URL.

Keys are fetched when first needed, again in the background when they are old, and again when a token names a key that is not there
(keys rotate), at most once per MIN_REFRESH_S. While the source is away the keys that are known go on to work. Nothing in a token says
where keys come from.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urljoin, urlsplit

import msgspec

from penstock.core.errors import ConfigError, StoreUnavailableError
from penstock.serving.gateway.security.addresses import is_loopback

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

MAX_JWKS_BYTES = 256 * 1024
MAX_KEYS = 64
MIN_REFRESH_S = 30.0
# How old keys may be before they are fetched again; after a failure without any keys, how soon to try again.
_MAX_AGE_S = 300.0
_RETRY_S = 1.0
_TIMEOUT_S = 5.0
_MAX_REDIRECTS = 3
_MIN_RSA_BITS = 2048

# An object of `cryptography`: RSAPublicKey for RS256, EllipticCurvePublicKey for ES256.
PublicKey: TypeAlias = Any
Fetch = Callable[[], Awaitable[bytes]]


class JwksError(ValueError):
    """The source cannot be read, or holds no key that fits. The message is for the operator."""


def fetcher(source: str, transport: httpx.AsyncBaseTransport | None = None) -> Fetch:
    """How to get the document of a file or URL. Raises ConfigError for a URL that is not https (plain http only to this machine)."""
    if "://" not in source:

        async def read_file() -> bytes:
            return await asyncio.to_thread(_read_bounded, Path(source))

        return read_file
    _check_url(source)

    async def get() -> bytes:
        async with asyncio.timeout(_TIMEOUT_S):
            return await _get(source, transport)

    return get


def check_file(source: str, algorithm: str) -> None:
    """Raise ConfigError when `source` is a file that holds no usable key. A URL is not asked: it may be away while we start."""
    if "://" in source:
        return
    try:
        parse_jwks(_read_bounded(Path(source)), algorithm)
    except OSError as error:
        raise ConfigError(f"--jwt-jwks: cannot read {source}: {error.strerror}.") from None
    except JwksError as error:
        raise ConfigError(f"--jwt-jwks: {source} cannot be used: {error}.") from None


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or "")):
        return
    raise ConfigError("--jwt-jwks takes a file or an https URL.")


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(MAX_JWKS_BYTES + 1)
    if len(content) > MAX_JWKS_BYTES:
        raise JwksError("the file is too large")
    return content


async def _get(url: str, transport: httpx.AsyncBaseTransport | None) -> bytes:
    """GET with a bound on size; a redirect may not leave the scheme, host and port of `url`."""
    import httpx

    origin = urlsplit(url)[:2]
    # Bytes as they come: a compressed answer could grow beyond any bound before it is counted.
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    async with httpx.AsyncClient(transport=transport, timeout=_TIMEOUT_S, follow_redirects=False) as client:
        for _ in range(_MAX_REDIRECTS + 1):
            async with client.stream("GET", url, headers=headers) as response:
                if response.is_redirect:
                    url = urljoin(url, response.headers["location"])
                    if urlsplit(url)[:2] != origin:
                        raise JwksError("the server redirects to another host")
                    continue
                if response.status_code != 200 or "content-encoding" in response.headers:
                    raise JwksError(f"the server answered {response.status_code}, or in an encoding nobody asked for")
                return await _collect(response)
    raise JwksError("too many redirects")


async def _collect(response: httpx.Response) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > MAX_JWKS_BYTES:
            raise JwksError("the document is too large")
    return bytes(content)


class Jwks:
    """Keys by `kid` for one algorithm. Used from one event loop."""

    def __init__(self, fetch: Fetch, algorithm: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._fetch = fetch
        self._algorithm = algorithm
        self._clock = clock
        self._keys: dict[str | None, PublicKey] = {}
        self._fetched_at: float | None = None
        self._tried_at: float | None = None
        self._away = False
        self._refreshing: asyncio.Task[None] | None = None

    async def find(self, kid: str | None) -> PublicKey | None:
        """The key that a token names; for one that names none the only key there is. None when there is no such key.

        Raises StoreUnavailableError while no keys could be had at all.
        """
        now = self._clock()
        key = self._known(kid)
        if key is None and self._may_refresh(now):
            await self._refresh()
            key = self._known(kid)
        elif self._fetched_at is not None and now - self._fetched_at > _MAX_AGE_S and self._may_refresh(now):
            self._start_refresh()
        if key is None and not self._keys:
            raise StoreUnavailableError("Tokens cannot be verified now. Retry shortly.")
        return key

    async def load(self) -> None:
        """Fetch now. Raises JwksError, OSError or whatever the source raises."""
        self._tried_at = self._clock()
        self._keys = parse_jwks(await self._fetch(), self._algorithm)
        self._fetched_at = self._clock()

    def _known(self, kid: str | None) -> PublicKey | None:
        if kid is not None and kid in self._keys:
            return self._keys[kid]
        if len(self._keys) == 1 and (kid is None or None in self._keys):
            return next(iter(self._keys.values()))
        return None

    def _may_refresh(self, now: float) -> bool:
        """A fetch that runs is joined, whatever the time."""
        if self._refreshing is not None or self._tried_at is None:
            return True
        return now - self._tried_at >= (MIN_REFRESH_S if self._keys else _RETRY_S)

    def _start_refresh(self) -> asyncio.Task[None]:
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._try_load())
        return self._refreshing

    async def _refresh(self) -> None:
        # Shielded: the request that began the fetch may be cancelled while others wait for it.
        await asyncio.shield(self._start_refresh())

    async def _try_load(self) -> None:
        try:
            await self.load()
        except (
            Exception
        ) as error:  # Whatever the source or the network raised: the old keys stay, and the log says it once.
            if not self._away:
                reason = str(error) if isinstance(error, JwksError) else type(error).__name__
                logger.error("keys for JWT cannot be fetched (%s); those known stay in force", reason)
            self._away = True
        else:
            if self._away:
                logger.warning("keys for JWT can be fetched again")
            self._away = False
        finally:
            self._refreshing = None


def parse_jwks(document: bytes, algorithm: str) -> dict[str | None, PublicKey]:
    """The keys of a JWKS that fit `algorithm` (RS256 or ES256), by `kid`. Others are left out: a set usually holds several kinds.

    Only public parameters are read, so that a set with private or shared secrets in it grants nothing. Raises JwksError.
    """
    try:
        entries = msgspec.json.decode(document)["keys"]
    except (msgspec.DecodeError, KeyError, TypeError, RecursionError):
        raise JwksError("it is not a JWKS") from None
    if not isinstance(entries, list) or len(entries) > MAX_KEYS:
        raise JwksError(f"it holds no list of at most {MAX_KEYS} keys")
    keys: dict[str | None, PublicKey] = {}
    for entry in entries:
        if isinstance(entry, dict) and _fits(entry, algorithm):
            key = _public_key(entry, algorithm)
            kid = entry.get("kid")
            if key is not None and (kid is None or isinstance(kid, str)):
                keys[kid] = key
    if not keys:
        raise JwksError(f"it holds no usable key for {algorithm}")
    return keys


def _fits(entry: dict[str, Any], algorithm: str) -> bool:
    operations = entry.get("key_ops")
    return (
        entry.get("kty") == ("RSA" if algorithm == "RS256" else "EC")
        and entry.get("alg") in (None, algorithm)
        and entry.get("use") in (None, "sig")
        and (operations is None or (isinstance(operations, list) and "verify" in operations))
    )


def _public_key(entry: dict[str, Any], algorithm: str) -> PublicKey | None:
    from jwt.algorithms import ECAlgorithm, RSAAlgorithm
    from jwt.exceptions import InvalidKeyError

    names = ("kty", "n", "e") if algorithm == "RS256" else ("kty", "crv", "x", "y")
    public = {name: entry.get(name) for name in names}
    if not all(isinstance(value, str) for value in public.values()):
        return None
    if algorithm == "ES256" and public["crv"] != "P-256":
        return None
    try:
        if algorithm == "ES256":
            return ECAlgorithm.from_jwk(public)
        key = RSAAlgorithm.from_jwk(public)
    except (InvalidKeyError, ValueError):
        return None
    return key if key.key_size >= _MIN_RSA_BITS else None
