"""What stands beside the engines: limits, response cache, admission, accounts; built from the settings and shared by the routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.accounts.interface import KeyDirectory, UsageSink
from penstock.serving.gateway.admission import Admission
from penstock.serving.gateway.cache.interface import CacheStore, FlightStore
from penstock.serving.gateway.cache.response_cache import ResponseCache, build_cache
from penstock.serving.gateway.limits.interface import LimitStore
from penstock.serving.gateway.limits.limiter import Limiter, build_limiter
from penstock.serving.gateway.security.startup import check_exposed
from penstock.telemetry.recorder import Recorder

if TYPE_CHECKING:
    from penstock.serving.gateway.accounts.admin import KeyAdmin


@dataclass(frozen=True, slots=True)
class SharedStores:
    """What several gateway processes share through their coordinator."""

    limits: LimitStore
    cache: CacheStore
    flights: FlightStore


@dataclass
class Services:
    """An async context manager: entered before the first request, left after the last.

    `usage`, `keys` and `admin` are None on a server without accounts. `on_close` releases what the services stand on, last made first.
    """

    limiter: Limiter
    cache: ResponseCache
    admission: Admission
    usage: UsageSink | None = None
    keys: KeyDirectory | None = None
    admin: KeyAdmin | None = None
    on_close: list[Callable[[], Awaitable[None]]] = field(default_factory=list)

    async def __aenter__(self) -> Services:
        await self.limiter.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Write what waits to be written and release everything."""
        await self.cache.close()
        await self.limiter.close()
        for close in reversed(self.on_close):
            await close()


def build_services(
    config: GatewayConfig,
    recorder: Recorder,
    version: str,
    *,
    shared: SharedStores | None = None,
    workers: int = 1,
) -> Services:
    """Limits, cache and admission over Redis, over the coordinator's `shared` stores, or in this process. No accounts: see `accounts`."""
    redis = None
    on_close: list[Callable[[], Awaitable[None]]] = []
    if config.redis_url:
        from penstock.serving.gateway.stores.redis_link import RedisLink

        redis = RedisLink(config.redis_url, recorder, timeout_s=config.redis_timeout_s)
        on_close.append(redis.close)
    return Services(
        limiter=build_limiter(config, recorder, redis=redis, shared=None if shared is None else shared.limits),
        cache=build_cache(
            config,
            recorder,
            version,
            redis=redis,
            shared_store=None if shared is None else shared.cache,
            shared_flights=None if shared is None else shared.flights,
        ),
        admission=Admission(config, recorder, worker_share=1 / workers),
        on_close=on_close,
    )


async def open_services(
    config: GatewayConfig,
    host: str,
    recorder: Recorder,
    version: str,
    *,
    shared: SharedStores | None = None,
    workers: int = 1,
) -> Services:
    """Everything, with accounts where identities or a database are asked for. `config` comes from `resolve_auth`.

    Raises ConfigError when something cannot be used, or when `host` can be reached and nobody could ask.
    """
    services = build_services(config, recorder, version, shared=shared, workers=workers)
    has_keys = False
    if config.auth_methods or config.database_url:
        from penstock.serving.gateway.accounts.open import open_accounts

        accounts = await open_accounts(config, recorder)
        services.usage, services.keys, services.admin = accounts.usage, accounts.keys, accounts.admin
        services.on_close.append(accounts.close)
        has_keys = accounts.has_keys
    try:
        check_exposed(config, host, has_keys)
    except BaseException:
        await services.close()
        raise
    return services
