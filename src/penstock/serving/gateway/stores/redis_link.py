"""One connection pool to Redis with a time-out and a circuit breaker, for limits, response cache and single flight.

An operation that fails or takes longer than the time-out raises StoreUnavailableError; the policy is the caller's. After a failure the
circuit is open: operations fail at once, without a wait, until a probe in the background has an answer again. One log line says that
Redis is away and one that it is back, whatever the number of requests between.

    closed ── time-out, broken connection ──▶ open ── the first probe is sent at once: a slow moment of ours or of Redis ends here
       ▲                                       │
       └────────────── PONG ◀── probe every 0.5 s (the first one too when the circuit was open a moment ago)

An answer that refuses an operation (no memory, read-only replica, wrong type) concerns that operation: it fails, the circuit stays closed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from penstock.core.errors import ConfigError, StoreUnavailableError
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder

if TYPE_CHECKING:
    from redis.asyncio import Redis

logger = logging.getLogger(__name__)

T = TypeVar("T")
STORE = "redis"
_PROBE_INTERVAL_S = 0.5
# A circuit that opens again within this time is not probed at once: who waits for Redis shall wait seldom.
_STEADY_S = 5.0
# Lines about an ill Redis that answers.
_LOG_INTERVAL_S = 10.0
# After the time-out: an answer that came while our event loop was busy is read before the time is up.
_GRACE_S = 0.05
_MAX_CONNECTIONS = 64

_AWAY = "Redis is not available. Retry shortly."


class RedisLink:
    """Used from one event loop. `generation` counts how often Redis came back: what it kept may be lost since.

    Raises ConfigError for a URL that is none, and without the redis package.
    """

    def __init__(self, url: str, recorder: Recorder, *, timeout_s: float) -> None:
        try:
            from redis.asyncio import BlockingConnectionPool, Redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise ConfigError("--redis-url needs the package redis: pip install 'penstock[redis]'") from error
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=_MAX_CONNECTIONS,
                timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )
        except ValueError as error:
            # The URL may hold a password, and the error the URL.
            raise ConfigError("--redis-url must look like redis://HOST:PORT/0.") from error
        self.redis: Redis = Redis(connection_pool=pool)
        self.generation = 0
        self._timeout_s = timeout_s
        self._recorder = recorder
        self._probe: asyncio.Task[None] | None = None
        self._closed_at = float("-inf")
        self._logged_at = float("-inf")
        self._recorder.set(metrics.STORE_UP, 1, STORE)

    @property
    def available(self) -> bool:
        """False while the circuit is open."""
        return self._probe is None

    async def call(self, operation: Callable[[Redis], Awaitable[T]], purpose: str) -> T:
        """The result of `operation`, which must not block in Redis. Raises StoreUnavailableError."""
        from redis.exceptions import RedisError, ResponseError

        if self._probe is not None:
            raise self._failed(purpose)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as bound:
                last_call = loop.call_later(self._timeout_s, lambda: bound.reschedule(loop.time() + _GRACE_S))
                try:
                    return await operation(self.redis)
                finally:
                    last_call.cancel()
        except ResponseError as error:
            self._log_sometimes("redis refuses operations for %s: %s", purpose, error)
        except (TimeoutError, OSError, RedisError) as error:
            self._open_circuit(error)
        raise self._failed(purpose)

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        await self.redis.aclose(close_connection_pool=True)

    def _failed(self, purpose: str) -> StoreUnavailableError:
        self._recorder.increment(metrics.STORE_ERRORS, STORE, purpose)
        return StoreUnavailableError(_AWAY)

    def _open_circuit(self, error: Exception) -> None:
        # Operations that were on their way fail after the first; the circuit is open or even closed again by then.
        if self._probe is None:
            self._recorder.set(metrics.STORE_UP, 0, STORE)
            self._probe = asyncio.create_task(self._probe_until_back(error), name="redis-probe")

    async def _probe_until_back(self, error: Exception) -> None:
        what = f"{type(error).__name__}: {error}".removesuffix(": ")
        was_steady = time.monotonic() - self._closed_at > _STEADY_S
        if was_steady and await self._answers():
            self._log_sometimes("redis failed once and answers again (%s)", what)
        else:
            logger.error("redis is away (%s); stated failure policies apply until it answers", what)
            while True:
                await asyncio.sleep(_PROBE_INTERVAL_S)
                if await self._answers():
                    break
            logger.warning("redis is back")
        self.generation += 1
        self._recorder.set(metrics.STORE_UP, 1, STORE)
        self._closed_at = time.monotonic()
        self._probe = None

    async def _answers(self) -> bool:
        from redis.exceptions import RedisError

        try:
            async with asyncio.timeout(self._timeout_s):
                # Idle connections lead to the Redis that failed; they may look well for long.
                await self.redis.connection_pool.disconnect(inuse_connections=False)
                await self.redis.ping()
        # Any of these means no; the caller says so in the log.
        except (TimeoutError, OSError, RedisError):
            return False
        return True

    def _log_sometimes(self, message: str, *values: object) -> None:
        now = time.monotonic()
        if now - self._logged_at >= _LOG_INTERVAL_S:
            self._logged_at = now
            logger.warning(message, *values)
