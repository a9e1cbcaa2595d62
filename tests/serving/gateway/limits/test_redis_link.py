"""The link to a real Redis that stops, hangs, restarts and refuses."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from typing import cast

import pytest
from redis.asyncio import Redis

from penstock.core.errors import ConfigError, StoreUnavailableError
from penstock.serving.gateway.stores import redis_link as module
from penstock.serving.gateway.stores.redis_link import STORE, RedisLink
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder
from tests.services import RedisServer
from tests.serving.gateway.limits.limit_clock import until

pytestmark = pytest.mark.redis

PATIENT_S = 10.0


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROBE_INTERVAL_S", 0.02)


@pytest.fixture
def server(redis_server: RedisServer) -> Iterator[RedisServer]:
    """A Redis that a test may stop and pause."""
    redis_server.fresh()
    yield redis_server
    redis_server.resume()
    redis_server.start()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
async def link(server: RedisServer, recorder: Recorder) -> AsyncIterator[RedisLink]:
    link = RedisLink(server.url, recorder, timeout_s=PATIENT_S)
    yield link
    await link.close()


async def ask(link: RedisLink, text: str = "hello") -> bytes:
    async def operation(redis: Redis) -> bytes:
        await redis.set("text", text)
        return cast(bytes, await redis.echo(text))

    return await link.call(operation, "tests")


async def until_back(link: RedisLink) -> None:
    await until(lambda: link.available)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == module.__name__]


async def test_a_stop_is_noticed_once_and_a_start_too(
    link: RedisLink, server: RedisServer, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert await ask(link) == b"hello"
    assert recorder.value(metrics.STORE_UP, STORE) == 1
    server.stop()
    for _ in range(50):
        with pytest.raises(StoreUnavailableError):
            await ask(link)
    await until(lambda: bool(lines(caplog)))
    assert not link.available
    assert recorder.value(metrics.STORE_UP, STORE) == 0
    assert recorder.value(metrics.STORE_ERRORS, STORE, "tests") == 50
    server.start()
    await until_back(link)
    assert await ask(link) == b"hello"
    assert (link.generation, recorder.value(metrics.STORE_UP, STORE)) == (1, 1)
    away, back = lines(caplog)
    assert away.startswith("redis is away (ConnectionError")
    assert back == "redis is back"


async def test_while_the_circuit_is_open_redis_is_not_asked(link: RedisLink, server: RedisServer) -> None:
    server.stop()
    with pytest.raises(StoreUnavailableError):
        await ask(link)

    async def never(redis: Redis) -> None:
        pytest.fail("asked")

    for _ in range(20):
        with pytest.raises(StoreUnavailableError):
            await link.call(never, "tests")


async def test_connections_of_before_a_restart_are_not_used(link: RedisLink, server: RedisServer) -> None:
    await asyncio.gather(*(ask(link, str(number)) for number in range(30)))
    server.stop()
    server.start()
    # The event loop has to learn that they are closed.
    await asyncio.sleep(0.01)
    answers = await asyncio.gather(*(ask(link, str(number)) for number in range(60)), return_exceptions=True)
    assert answers == [str(number).encode() for number in range(60)]
    assert link.available


async def test_a_redis_that_hangs_costs_one_time_out(server: RedisServer, recorder: Recorder) -> None:
    link = RedisLink(server.url, recorder, timeout_s=0.3)
    assert await ask(link) == b"hello"
    server.pause()
    answers = await asyncio.gather(*(ask(link) for _ in range(20)), return_exceptions=True)
    assert all(isinstance(answer, StoreUnavailableError) for answer in answers)
    before = asyncio.get_running_loop().time()
    for _ in range(100):
        with pytest.raises(StoreUnavailableError):
            await ask(link)
    # A hundred time-outs would be half a minute.
    assert asyncio.get_running_loop().time() - before < 10
    server.resume()
    await until_back(link)
    assert await ask(link, "again") == b"again"
    await link.close()


async def test_an_answer_that_refuses_leaves_the_circuit_closed(
    link: RedisLink, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    await ask(link)
    for _ in range(30):
        with pytest.raises(StoreUnavailableError):
            await link.call(lambda redis: redis.incr("text"), "tests")
        assert link.available
    assert await ask(link) == b"hello"
    assert recorder.value(metrics.STORE_ERRORS, STORE, "tests") == 30
    assert len(lines(caplog)) == 1


async def test_one_slow_moment_is_no_outage(
    link: RedisLink, recorder: Recorder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(redis: Redis) -> None:
        raise TimeoutError

    await ask(link)
    with pytest.raises(StoreUnavailableError):
        await link.call(slow, "tests")
    await until_back(link)
    assert await ask(link) == b"hello"
    assert [line.partition(" (")[0] for line in lines(caplog)] == ["redis failed once and answers again"]
    # The second within moments is not probed at once, so that requests seldom wait for it.
    monkeypatch.setattr(module, "_PROBE_INTERVAL_S", 3600.0)
    with pytest.raises(StoreUnavailableError):
        await link.call(slow, "tests")
    for _ in range(20):
        await asyncio.sleep(0.005)
        assert not link.available


async def test_an_answer_that_waits_for_our_event_loop_is_in_time(server: RedisServer, recorder: Recorder) -> None:
    link = RedisLink(server.url, recorder, timeout_s=0.3)
    await ask(link)
    tasks = [asyncio.create_task(link.call(lambda redis: redis.ping(), "tests")) for _ in range(2)]
    for _ in range(20):
        await asyncio.sleep(0)
    time.sleep(0.6)  # noqa: ASYNC251  the loop is busy with something else
    await asyncio.gather(*tasks)
    assert link.available
    await link.close()


async def test_a_cancelled_operation_does_not_leave_its_answer_to_the_next(link: RedisLink) -> None:
    for number in range(20):
        task = asyncio.create_task(ask(link, f"cancelled {number}"))
        for _ in range(number):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await ask(link, f"kept {number}") == f"kept {number}".encode()
    assert link.available


async def test_an_error_of_the_caller_is_the_callers(link: RedisLink) -> None:
    async def broken(redis: Redis) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        await link.call(broken, "tests")
    assert link.available


async def test_closing_while_redis_is_away(link: RedisLink, server: RedisServer) -> None:
    server.stop()
    with pytest.raises(StoreUnavailableError):
        await ask(link)
    await link.close()
    await link.close()


def test_a_url_that_is_none_does_not_show_its_password(recorder: Recorder) -> None:
    with pytest.raises(ConfigError) as caught:
        RedisLink("postgres://user:hunter2@host/0", recorder, timeout_s=1)
    assert "hunter2" not in str(caught.value)
