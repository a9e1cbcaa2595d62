"""Answers in Redis: typed msgpack under penstock:rc:{KEY}, gone when their time is over.

    value = version byte | msgpack [key, entry]

What is read is checked like what a stranger sends: size before it is fetched, types by the decoder, then that it is the answer to this key
and whole. Anything else is a miss, counted and deleted.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, cast

import msgspec

from penstock.core.errors import StoreUnavailableError
from penstock.serving.gateway.cache.interface import Entry
from penstock.serving.gateway.stores.redis_link import STORE, RedisLink
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder

if TYPE_CHECKING:
    from redis.asyncio import Redis

logger = logging.getLogger(__name__)

PURPOSE = "cache"
CORRUPT = "cache_corrupt"
FORMAT = b"\x01"
# Decoding is on the event loop; this much takes some milliseconds.
MAX_VALUE_BYTES = 4 * 1024 * 1024


class _Value(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    key: str
    entry: Entry


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Value).decode


class RedisStore:
    """A CacheStore. Does not own the link."""

    def __init__(self, link: RedisLink, recorder: Recorder, *, max_value_bytes: int = MAX_VALUE_BYTES) -> None:
        self._link = link
        self._recorder = recorder
        self._max_value_bytes = max_value_bytes

    async def get(self, key: str) -> Entry | None:
        try:
            value = await self._link.call(lambda redis: self._read(redis, _name(key)), PURPOSE)
            if value == b"":
                return None
            entry = None if value is None else self._entry(key, value)
            if entry is None:
                logger.warning("a value in the response cache cannot be used; it is deleted")
                self._recorder.increment(metrics.STORE_ERRORS, STORE, CORRUPT)
                await self._link.call(lambda redis: redis.delete(_name(key)), PURPOSE)
            return entry
        except StoreUnavailableError:
            # The link has counted and logged it; without a cache every request is a miss.
            return None

    async def put(self, key: str, entry: Entry, ttl_s: float) -> None:
        value = FORMAT + _encode(_Value(key, entry))
        if len(value) > self._max_value_bytes:
            return
        lifetime = max(1, int(ttl_s * 1000))
        try:
            await self._link.call(lambda redis: redis.set(_name(key), value, px=lifetime), PURPOSE)
        except StoreUnavailableError:
            # The link has counted and logged it; the answer is not kept.
            return

    async def close(self) -> None: ...

    async def _read(self, redis: Redis, name: str) -> bytes | None:
        """The value, b"" when there is none, None for one that is not a string."""
        from redis.exceptions import ResponseError

        try:
            value = await redis.getrange(name, 0, self._max_value_bytes)
        except ResponseError as error:
            # Redis is well; only this key holds something else.
            if "WRONGTYPE" in str(error):
                return None
            raise
        return cast("bytes", value)

    def _entry(self, key: str, value: bytes) -> Entry | None:
        if len(value) > self._max_value_bytes or not value.startswith(FORMAT):
            return None
        try:
            decoded = _decode(memoryview(value)[len(FORMAT) :])
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        return decoded.entry if decoded.key == key and _is_whole(decoded.entry) else None


def _name(key: str) -> str:
    return f"penstock:rc:{{{key}}}"


def _is_whole(entry: Entry) -> bool:
    """Choices in order, each once, each ended by itself."""
    places = [(prompt, delta.index) for prompt, delta in entry.news]
    return (
        bool(places)
        and math.isfinite(entry.created_at)
        and all(prompt >= 0 and index >= 0 for prompt, index in places)
        and places == sorted(set(places))
        and all(delta.finish_reason in ("stop", "length") for _, delta in entry.news)
    )
