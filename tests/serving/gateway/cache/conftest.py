"""The stores that several gateway processes share: a test that takes `flight_stores` runs in memory, over a coordinator and on a real
Redis."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import cast

import pytest

from penstock.serving.gateway.cache.interface import FlightStore
from penstock.serving.gateway.cache.local_flight_store import LocalFlightStore
from penstock.serving.gateway.cache.memory_store import MemoryStore
from penstock.serving.gateway.cache.redis_flight_store import RedisFlightStore
from penstock.serving.gateway.limits.local_store import LocalLimitStore
from penstock.serving.gateway.stores.coordinator_client import CoordinatorFlightStore, CoordinatorLink
from penstock.serving.gateway.stores.coordinator_server import CoordinatorServer
from penstock.serving.gateway.stores.redis_link import RedisLink
from penstock.telemetry.recorder import Recorder
from tests.services import RedisServer, redis_server

__all__ = ["redis_server"]

Stores = Callable[[], FlightStore]
# More than any test has.
MAX_PROCESSES = 16


@pytest.fixture
async def redis_links(redis_server: RedisServer) -> AsyncIterator[Callable[[], RedisLink]]:
    """A link as each gateway process has one, to an empty server."""
    links: list[RedisLink] = []
    url = redis_server.fresh()

    def connect() -> RedisLink:
        # A busy machine may be slow, and none of these tests is about the time-out.
        links.append(RedisLink(url, Recorder(), timeout_s=5.0))
        return links[-1]

    yield connect
    for link in links:
        await link.close()


@pytest.fixture
async def coordinator() -> AsyncIterator[Stores]:
    """The store as each process that is connected to one coordinator sees it."""
    async with AsyncExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "coordinator"
        server = CoordinatorServer(LocalLimitStore(), MemoryStore(10**6, Recorder()), LocalFlightStore())
        await server.start(path)
        stack.push_async_callback(server.close)
        links = [CoordinatorLink(path, Recorder(), timeout_s=5.0) for _ in range(MAX_PROCESSES)]
        for link in links:
            await link.start()
            stack.push_async_callback(link.close)
        yield lambda: CoordinatorFlightStore(links.pop())


@pytest.fixture(params=["memory", "coordinator", pytest.param("redis", marks=pytest.mark.redis)])
def flight_stores(request: pytest.FixtureRequest) -> Stores:
    """The store as each gateway process sees it."""
    if request.param == "memory":
        store = LocalFlightStore()
        return lambda: store
    if request.param == "coordinator":
        return cast(Stores, request.getfixturevalue("coordinator"))
    connect = cast(Callable[[], RedisLink], request.getfixturevalue("redis_links"))
    return lambda: RedisFlightStore(connect())
