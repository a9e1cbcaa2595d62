"""The coordinator: stores behind a Unix socket are the stores; away means an error at once, and back means back."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from penstock.core.errors import StoreUnavailableError
from penstock.core.framing import FrameError, frame, read_frame
from penstock.serving.frontend.client import Delta, TokenLogprob
from penstock.serving.gateway.cache.interface import Entry, Log
from penstock.serving.gateway.cache.local_flight_store import LocalFlightStore
from penstock.serving.gateway.limits.interface import Reservation, Subject, Verdict, Window
from penstock.serving.gateway.limits.local_store import LocalLimitStore
from penstock.serving.gateway.stores.coordinator_client import (
    STORE,
    CoordinatorCacheStore,
    CoordinatorFlightStore,
    CoordinatorLimitStore,
    CoordinatorLink,
)
from penstock.serving.gateway.stores.coordinator_server import MAX_LOG_BYTES, CoordinatorServer
from penstock.serving.gateway.stores.protocol import MAX_FRAME_BYTES, CacheGet
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder

RESERVATION = Reservation("r1", "acme", [Subject("key:a", 2, 100, 1), Subject("tenant:acme", None, None, 3)], 40)


class Stores:
    """The three stores as plain dictionaries, with a log of what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.entries: dict[str, Entry] = {}
        self.log = Log([], "running")
        self.news = asyncio.Event()
        self.hang = asyncio.Event()
        self.hang.set()
        self.closed = 0

    async def admit(self, reservation: Reservation) -> Verdict:
        self.asked.append(("admit", reservation))
        await self.hang.wait()
        if reservation.tenant == "broken":
            raise RuntimeError("a bug")
        return Verdict(False, "tokens", "key:a", 1.5, Window(2, 1, 60.0), None)

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        self.asked.append(("settle", reservation, tokens))

    async def renew(self, reservations: list[Reservation]) -> None:
        self.asked.append(("renew", reservations))

    async def get(self, key: str) -> Entry | None:
        return self.entries.get(key)

    async def put(self, key: str, entry: Entry, ttl_s: float) -> None:
        self.asked.append(("put", key, ttl_s))
        self.entries[key] = entry

    async def claim(self, key: str, owner: str, lease_s: float) -> bool:
        self.asked.append(("claim", key, owner, lease_s))
        return owner == "first"

    async def append(self, key: str, owner: str, chunk: bytes, lease_s: float) -> bool:
        self.log = Log([*self.log.chunks, chunk], "running")
        self.news.set()
        return True

    async def finish(self, key: str, owner: str, chunk: bytes, keep_s: float) -> None:
        self.log = Log([*self.log.chunks, chunk], "finished")
        self.news.set()

    async def abandon(self, key: str, owner: str) -> None:
        self.asked.append(("abandon", key, owner))

    async def read(self, key: str, position: int, wait_s: float) -> Log:
        if position >= len(self.log.chunks) and self.log.state == "running":
            await asyncio.wait_for(self.news.wait(), wait_s)
        return Log(self.log.chunks[position:], self.log.state)

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "coordinator"


@asynccontextmanager
async def coordinator(path: Path) -> AsyncIterator[Stores]:
    stores = Stores()
    server = CoordinatorServer(stores, stores, stores)
    await server.start(path)
    try:
        yield stores
    finally:
        await server.close()


@asynccontextmanager
async def connected(path: Path, timeout_s: float = 30.0) -> AsyncIterator[CoordinatorLink]:
    link = CoordinatorLink(path, Recorder(), timeout_s=timeout_s)
    await link.start()
    try:
        yield link
    finally:
        await link.close()


async def until(condition: object) -> None:
    async with asyncio.timeout(20):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def errors(link: CoordinatorLink, purpose: str) -> float:
    return link._recorder.value(metrics.STORE_ERRORS, STORE, purpose)


async def test_limits_arrive_and_return_as_they_are(path: Path) -> None:
    async with coordinator(path) as stores, connected(path) as link:
        limits = CoordinatorLimitStore(link)
        assert await limits.admit(RESERVATION) == Verdict(False, "tokens", "key:a", 1.5, Window(2, 1, 60.0), None)
        await limits.settle(RESERVATION, 7)
        await limits.renew([RESERVATION])
        assert stores.asked == [("admit", RESERVATION), ("settle", RESERVATION, 7), ("renew", [RESERVATION])]
        assert link.available
        assert link._recorder.value(metrics.STORE_UP, STORE) == 1


async def test_cached_answers_come_back_whole(path: Path) -> None:
    logprobs = [TokenLogprob(5, "é", "é".encode(), -0.5)]
    news = [(0, Delta(0, "éa", [5, 6], 0, 2, 3, 1, logprobs, finish_reason="stop", stop_reason="x"))]
    entry = Entry(1234.5, [*news, (1, Delta(0, "", [], 0, 0, 3, stop_reason=17, queue_time_s=0.25))])
    async with coordinator(path), connected(path) as link:
        cache = CoordinatorCacheStore(link)
        assert await cache.get("k") is None
        await cache.put("k", entry, 60.0)
        assert await cache.get("k") == entry


async def test_flights_are_shared_and_a_waiting_read_stops_nobody(path: Path) -> None:
    async with coordinator(path), connected(path) as first, connected(path) as second:
        leader, follower = CoordinatorFlightStore(first), CoordinatorFlightStore(second)
        assert await leader.claim("k", "first", 10.0)
        assert not await follower.claim("k", "second", 10.0)
        reading = asyncio.create_task(follower.read("k", 0, 30.0))
        assert await CoordinatorCacheStore(second).get("other") is None
        assert not reading.done()
        assert await leader.append("k", "first", b"one", 10.0)
        assert await reading == Log([b"one"], "running")
        await leader.finish("k", "first", b"two", 5.0)
        assert await follower.read("k", 1, 30.0) == Log([b"two"], "finished")


async def test_a_long_log_is_read_in_parts(path: Path) -> None:
    async with coordinator(path) as stores, connected(path) as link:
        chunks = [bytes([n]) * (MAX_LOG_BYTES // 2) for n in range(5)]
        stores.log = Log(chunks, "finished")
        flights = CoordinatorFlightStore(link)
        read: list[bytes] = []
        states: list[str] = []
        while not states or states[-1] == "running":
            part = await flights.read("k", len(read), 1.0)
            read += part.chunks
            states.append(part.state)
        assert read == chunks
        assert states == ["running", "running", "finished"]


async def test_calls_are_pipelined_and_answered_by_id(path: Path) -> None:
    async with coordinator(path) as stores, connected(path) as link:
        flights = CoordinatorFlightStore(link)
        results = await asyncio.gather(*(flights.claim("k", "first" if n % 3 == 0 else "x", 1.0) for n in range(300)))
        assert results == [n % 3 == 0 for n in range(300)]
        assert len(stores.asked) == 300
        assert link._calls == {}


async def test_an_operation_that_fails_concerns_only_its_caller(path: Path) -> None:
    async with coordinator(path), connected(path) as link:
        limits = CoordinatorLimitStore(link)
        broken = msgspec.structs.replace(RESERVATION, tenant="broken")
        with pytest.raises(StoreUnavailableError):
            await limits.admit(broken)
        assert (await limits.admit(RESERVATION)).subject == "key:a"
        assert (errors(link, "limits"), link.available) == (1, True)


async def test_a_connection_that_breaks_fails_what_waits_and_is_made_again(path: Path) -> None:
    async with coordinator(path) as stores, connected(path) as link:
        stores.hang.clear()
        waiting = asyncio.create_task(CoordinatorLimitStore(link).admit(RESERVATION))
        await until(lambda: stores.asked)
        assert link._writer is not None
        link._writer.transport.abort()
        with pytest.raises(StoreUnavailableError):
            await waiting
        stores.hang.set()
        await until(lambda: link.generation == 1)
        assert (await CoordinatorLimitStore(link).admit(RESERVATION)).subject == "key:a"


async def test_away_is_an_error_at_once_with_one_log_line_and_back_is_back(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with connected(path) as link:
        limits, cache = CoordinatorLimitStore(link), CoordinatorCacheStore(link)
        assert not link.available
        for _ in range(50):
            with pytest.raises(StoreUnavailableError):
                await limits.admit(RESERVATION)
        assert await cache.get("k") is None
        await cache.put("k", Entry(0.0, []), 1.0)
        assert (errors(link, "limits"), errors(link, "cache")) == (50, 2)
        assert link._recorder.value(metrics.STORE_UP, STORE) == 0
        async with coordinator(path):
            await until(lambda: link.available)
            assert (await limits.admit(RESERVATION)).subject == "key:a"
            assert link.generation == 1
            lines = [record.message for record in caplog.records]
    assert len(lines) == 2
    assert "is away" in lines[0]
    assert lines[1] == "the coordinator is back"


async def test_a_coordinator_that_hangs_counts_as_away(path: Path) -> None:
    async with coordinator(path) as stores, connected(path, timeout_s=0.2) as link:
        stores.hang.clear()
        with pytest.raises(StoreUnavailableError):
            await CoordinatorLimitStore(link).admit(RESERVATION)
        assert not link.available
        stores.hang.set()
        await until(lambda: link.available)


async def test_closing_ends_what_waits(path: Path) -> None:
    async with coordinator(path) as stores:
        async with connected(path) as link:
            stores.hang.clear()
            waiting = asyncio.create_task(CoordinatorLimitStore(link).admit(RESERVATION))
            await until(lambda: stores.asked)
        with pytest.raises(StoreUnavailableError):
            await waiting
    assert stores.closed == 3


async def test_a_limit_is_exact_over_two_workers(path: Path) -> None:
    store = LocalLimitStore()
    server = CoordinatorServer(store, Stores(), Stores())
    await server.start(path)
    async with connected(path) as first, connected(path) as second:
        stores = [CoordinatorLimitStore(first), CoordinatorLimitStore(second)]
        subjects = [Subject("key:k", 50, None, None), Subject("tenant:t", None, 1000, 30)]
        asked = [Reservation(f"r{n}", "t", subjects, 20) for n in range(200)]
        verdicts = await asyncio.gather(*(stores[n % 2].admit(asked[n]) for n in range(200)))
        assert sum(verdict.allowed for verdict in verdicts) == 30
        assert {verdict.refused_by for verdict in verdicts} == {None, "concurrency"}
        admitted = [one for one, verdict in zip(asked, verdicts, strict=True) if verdict.allowed]
        await asyncio.gather(*(stores[n % 2].settle(one, 20) for n, one in enumerate(admitted)))
        again = await asyncio.gather(
            *(stores[n % 2].admit(Reservation(f"s{n}", "t", subjects, 20)) for n in range(200))
        )
        assert sum(verdict.allowed for verdict in again) == 20
        assert {verdict.refused_by for verdict in again} <= {None, "requests", "tokens"}
    await server.close()


async def test_one_worker_follows_the_generation_that_another_leads(path: Path) -> None:
    server = CoordinatorServer(Stores(), Stores(), LocalFlightStore())
    await server.start(path)
    async with connected(path) as first, connected(path) as second:
        leader, follower = CoordinatorFlightStore(first), CoordinatorFlightStore(second)
        claims = await asyncio.gather(leader.claim("k", "a", 10.0), follower.claim("k", "b", 10.0))
        assert tuple(claims) == (True, False)
        chunks: list[bytes] = []

        async def follow() -> str:
            while True:
                log = await follower.read("k", len(chunks), 20.0)
                chunks.extend(log.chunks)
                if log.state != "running":
                    return log.state

        following = asyncio.create_task(follow())
        for n in range(20):
            assert await leader.append("k", "a", b"%d" % n, 10.0)
            await asyncio.sleep(0)
        await leader.finish("k", "a", b"end", 10.0)
        assert await following == "finished"
        assert chunks == [*(b"%d" % n for n in range(20)), b"end"]
        assert await follower.claim("k", "b", 10.0)
    await server.close()


@pytest.mark.parametrize(
    "data",
    [
        (MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
        frame(b"\x80not a call", 100),
        frame(msgspec.msgpack.encode([1, ["format_disk"]]), 100),
        b"\x00\x00",
    ],
)
async def test_what_is_not_the_protocol_ends_only_its_connection(path: Path, data: bytes) -> None:
    async with coordinator(path), connected(path) as link:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(data)
        writer.write_eof()
        async with asyncio.timeout(20):
            assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        assert (await CoordinatorLimitStore(link).admit(RESERVATION)).subject == "key:a"


async def test_an_entry_above_a_frame_is_not_sent(path: Path) -> None:
    async with coordinator(path) as stores, connected(path) as link:
        text = "x" * (MAX_FRAME_BYTES + 1)
        await CoordinatorCacheStore(link).put("k", Entry(0.0, [(0, Delta(0, text, [], 0, 0, 0))]), 1.0)
        assert (stores.asked, errors(link, "cache"), link.available) == ([], 1, True)


async def test_frames_are_bounded_and_whole() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(frame(b"one", 10) + frame(b"", 10) + frame(b"three", 10)[:-1])
    reader.feed_eof()
    assert [await read_frame(reader, 10), await read_frame(reader, 10)] == [b"one", b""]
    with pytest.raises(FrameError, match="inside"):
        await read_frame(reader, 10)
    assert await read_frame(reader, 10) is None
    with pytest.raises(FrameError, match="limit"):
        frame(b"12345678901", 10)


def test_operations_are_tagged_lists() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(CacheGet("k"))) == ["get", "k"]
