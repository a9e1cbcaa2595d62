"""One connection pool to Redis with a time-out and a circuit breaker, for limits, response cache and single flight.

An operation that fails or takes longer than the time-out raises StoreUnavailableError; the policy is the caller's. After a failure the
circuit is open: operations fail at once, without a wait, until a probe in the background has an answer again. One log line says that
Redis is away and one that it is back, whatever the number of requests between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from penstock.core.errors import StoreUnavailableError
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder

if TYPE_CHECKING:
    from redis.asyncio import Redis

logger = logging.getLogger(__name__)

T = TypeVar("T")
STORE = "redis"
_PROBE_INTERVAL_S = 0.5
_MAX_CONNECTIONS = 64


class RedisLink:
    """Used from one event loop. `generation` counts how often Redis came back: what it kept may be lost since."""

    def __init__(self, url: str, recorder: Recorder, *, timeout_s: float) -> None:
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_MAX_CONNECTIONS,
            timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
        self.redis: Redis = Redis(connection_pool=pool)
        self.generation = 0
        self._timeout_s = timeout_s
        self._recorder = recorder
        self._probe: asyncio.Task[None] | None = None
        self._recorder.set(metrics.STORE_UP, 1, STORE)

    @property
    def available(self) -> bool:
        """False while the circuit is open."""
        return self._probe is None

    async def call(
        self, operation: Callable[[Redis], Awaitable[T]], purpose: str, *, wait_s: float = 0.0
    ) -> T:
        """The result of `operation`, which may block in Redis for `wait_s`. Raises StoreUnavailableError."""
        from redis.exceptions import RedisError

        if self._probe is not None:
            self._recorder.increment(metrics.STORE_ERRORS, STORE, purpose)
            raise StoreUnavailableError("Redis is not available. Retry shortly.")
        try:
            async with asyncio.timeout(self._timeout_s + wait_s):
                return await operation(self.redis)
        except (TimeoutError, OSError, RedisError) as error:
            self._recorder.increment(metrics.STORE_ERRORS, STORE, purpose)
            self._open_circuit(error)
            raise StoreUnavailableError("Redis is not available. Retry shortly.") from None

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        await self.redis.aclose()

    def _open_circuit(self, error: Exception) -> None:
        if self._probe is None:
            logger.error("redis is away (%s: %s); stated failure policies apply until it answers", type(error).__name__, error)
            self._recorder.set(metrics.STORE_UP, 0, STORE)
            self._probe = asyncio.create_task(self._probe_until_back())

    async def _probe_until_back(self) -> None:
        from redis.exceptions import RedisError

        while True:
            await asyncio.sleep(_PROBE_INTERVAL_S)
            with contextlib.suppress(TimeoutError, OSError, RedisError):
                async with asyncio.timeout(self._timeout_s):
                    await self.redis.ping()
                break
        self.generation += 1
        self._recorder.set(metrics.STORE_UP, 1, STORE)
        logger.warning("redis is back")
        self._probe = None
