"""Claims and logs of shared generations, in memory, over a coordinator and on a real Redis: one contract."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from penstock.core.errors import StoreUnavailableError
from penstock.serving.gateway.cache.interface import FlightStore
from penstock.serving.gateway.cache.local_flight_store import LocalFlightStore
from penstock.serving.gateway.cache.redis_flight_store import RedisFlightStore
from penstock.serving.gateway.stores.redis_link import RedisLink
from penstock.telemetry.recorder import Recorder
from tests.services import RedisServer

Stores = Callable[[], FlightStore]
LEASE_S = 30.0


async def test_one_of_many_leads(flight_stores: Stores) -> None:
    stores = [flight_stores() for _ in range(4)]
    claims = [stores[number % 4].claim("k", f"o{number}", LEASE_S) for number in range(40)]
    assert sum(await asyncio.gather(*claims)) == 1
    assert await stores[0].claim("another", "o", LEASE_S)


async def test_readers_get_the_log_from_any_position(flight_stores: Stores) -> None:
    leader, reader = flight_stores(), flight_stores()
    assert await leader.claim("k", "o", LEASE_S)
    log = await reader.read("k", 0, 0.0)
    assert (log.chunks, log.state) == ([], "running")
    for chunk in (b"one", b"\x00\xff!.", b"three"):
        assert await leader.append("k", "o", chunk, LEASE_S)
    assert await leader.append("k", "o", b"", LEASE_S)
    log = await reader.read("k", 0, 0.0)
    assert (log.chunks, log.state) == ([b"one", b"\x00\xff!.", b"three"], "running")
    assert (await reader.read("k", 2, 0.0)).chunks == [b"three"]
    assert (await reader.read("k", 9, 0.0)).chunks == []
    await leader.finish("k", "o", b"last", LEASE_S)
    log = await reader.read("k", 2, 0.0)
    assert (log.chunks, log.state) == ([b"three", b"last"], "finished")
    log = await reader.read("k", 4, 5.0)
    assert (log.chunks, log.state) == ([], "finished")


async def test_a_reader_waits_for_the_next_chunk(flight_stores: Stores) -> None:
    leader, reader = flight_stores(), flight_stores()
    assert await leader.claim("k", "o", LEASE_S)
    waiting = [asyncio.create_task(reader.read("k", 0, 20.0)) for _ in range(3)]
    await asyncio.sleep(0.02)
    assert not any(task.done() for task in waiting)
    await leader.append("k", "o", b"one", LEASE_S)
    for log in await asyncio.gather(*waiting):
        assert log.chunks == [b"one"]
    assert (await reader.read("k", 1, 0.02)).state == "running"


async def test_a_finished_key_can_be_claimed_anew_with_an_empty_log(flight_stores: Stores) -> None:
    store = flight_stores()
    assert await store.claim("k", "o", LEASE_S)
    await store.append("k", "o", b"one", LEASE_S)
    await store.finish("k", "o", b"end", LEASE_S)
    assert await store.claim("k", "p", LEASE_S)
    log = await store.read("k", 0, 0.0)
    assert (log.chunks, log.state) == ([], "running")
    # The one before has nothing to say any more.
    assert not await store.append("k", "o", b"late", LEASE_S)
    await store.finish("k", "o", b"late", LEASE_S)
    await store.abandon("k", "o")
    assert (await store.read("k", 0, 0.0)).state == "running"


async def test_readers_see_that_a_leader_gave_up(flight_stores: Stores) -> None:
    leader, reader = flight_stores(), flight_stores()
    assert (await reader.read("k", 0, 5.0)).state == "gone"
    assert await leader.claim("k", "o", LEASE_S)
    await leader.append("k", "o", b"one", LEASE_S)
    waiting = asyncio.create_task(reader.read("k", 1, 20.0))
    await asyncio.sleep(0.01)
    await leader.abandon("k", "o")
    log = await waiting
    assert (log.chunks, log.state) == ([], "gone")
    assert await reader.claim("k", "p", LEASE_S)


async def test_a_claim_that_is_not_renewed_expires(flight_stores: Stores) -> None:
    leader, reader = flight_stores(), flight_stores()
    assert await leader.claim("k", "o", 0.05)
    waiting = asyncio.create_task(reader.read("k", 0, 20.0))
    assert (await waiting).state == "gone"
    assert not await leader.append("k", "o", b"late", LEASE_S)
    assert await reader.claim("k", "p", LEASE_S)


async def test_renewing_keeps_the_claim(flight_stores: Stores) -> None:
    store = flight_stores()
    assert await store.claim("k", "o", 0.2)
    assert await store.append("k", "o", b"", LEASE_S)
    await asyncio.sleep(0.25)
    assert not await store.claim("k", "p", LEASE_S)


async def test_a_finished_log_goes_after_its_time(flight_stores: Stores) -> None:
    store = flight_stores()
    assert await store.claim("k", "o", LEASE_S)
    await store.finish("k", "o", b"end", 0.05)
    assert (await store.read("k", 0, 0.0)).state == "finished"
    await asyncio.sleep(0.1)
    log = await store.read("k", 0, 0.0)
    assert (log.chunks, log.state) == ([], "gone")


async def test_a_long_log_comes_in_pieces_and_whole(flight_stores: Stores) -> None:
    store = flight_stores()
    assert await store.claim("k", "o", LEASE_S)
    chunks = [b"%d" % number for number in range(700)]
    for chunk in chunks[:-1]:
        await store.append("k", "o", chunk, LEASE_S)
    await store.finish("k", "o", chunks[-1], LEASE_S)
    found: list[bytes] = []
    while (log := await store.read("k", len(found), 0.0)).state == "running":
        found += log.chunks
    assert found + log.chunks == chunks


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_the_store_in_memory_has_bounds_and_forgets() -> None:
    clock = Clock()
    store = LocalFlightStore(clock, max_flights=3, max_bytes=100)
    for number in range(5):
        # Whoever finds it full leads without a log.
        assert await store.claim(f"k{number}", "o", LEASE_S)
    assert len(store) == 3
    assert not await store.append("k4", "o", b"x", LEASE_S)
    assert await store.append("k0", "o", b"x" * 60, LEASE_S)
    assert not await store.append("k1", "o", b"x" * 60, LEASE_S)
    assert (await store.read("k1", 0, 0.0)).state == "gone"
    assert store.size == 60
    clock.now += LEASE_S
    assert await store.claim("new", "o", LEASE_S)
    assert (len(store), store.size) == (1, 0)
    await store.close()
    assert len(store) == 0


@pytest.mark.redis
async def test_redis_away_is_said_so_and_over_when_it_is_back(redis_server: RedisServer) -> None:
    redis_server.fresh()
    link = RedisLink(redis_server.url, Recorder(), timeout_s=1.0)
    store = RedisFlightStore(link)
    assert await store.claim("k", "o", LEASE_S)
    redis_server.stop()
    try:
        with pytest.raises(StoreUnavailableError):
            await store.append("k", "o", b"x", LEASE_S)
        with pytest.raises(StoreUnavailableError):
            await store.read("k", 0, 1.0)
    finally:
        redis_server.start()
    async with asyncio.timeout(30):
        while not link.available:  # noqa: ASYNC110  # the link has no event for it
            await asyncio.sleep(0.05)
    assert not await store.append("k", "o", b"x", LEASE_S)
    assert await store.claim("k", "o", LEASE_S)
    await link.close()
