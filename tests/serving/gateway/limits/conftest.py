"""The stores that limits are counted in: every test that takes `make_store` runs on the one in memory and on a real Redis, on a clock
that the test moves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import cast

import pytest

from penstock.serving.gateway.limits.interface import LimitStore
from penstock.serving.gateway.limits.local_store import EXACT_ENTRIES, LocalLimitStore
from penstock.serving.gateway.limits.redis_store import RedisLimitStore
from penstock.serving.gateway.stores.redis_link import RedisLink
from penstock.telemetry.recorder import Recorder
from tests.services import RedisServer, postgres_server, redis_server
from tests.serving.gateway.limits.limit_clock import Clock

__all__ = ["postgres_server", "redis_server"]

MakeStore = Callable[..., LimitStore]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def redis_link(redis_server: RedisServer) -> AsyncIterator[RedisLink]:
    """A link to an empty Redis, with time enough for a busy machine."""
    link = RedisLink(redis_server.fresh(), Recorder(), timeout_s=10)
    yield link
    await link.close()


@pytest.fixture(params=["local", pytest.param("redis", marks=pytest.mark.redis)])
def make_store(request: pytest.FixtureRequest, clock: Clock) -> MakeStore:
    """An empty store on `clock`."""
    link = cast(RedisLink, request.getfixturevalue("redis_link")) if request.param == "redis" else None

    def make(*, exact_entries: int = EXACT_ENTRIES) -> LimitStore:
        if link is None:
            return LocalLimitStore(clock, exact_entries=exact_entries)
        return RedisLimitStore(link, exact_entries=exact_entries, clock=clock)

    return make


@pytest.fixture
def store(make_store: MakeStore) -> LimitStore:
    return make_store()
