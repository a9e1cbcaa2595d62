"""200 clients over two processes that share one Redis, in real time: never more than the limit, and refusals count for nothing."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from penstock.serving.gateway.limits.interface import Reservation, Subject
from penstock.serving.gateway.limits.redis_store import RedisLimitStore
from penstock.serving.gateway.stores.redis_link import RedisLink
from tests.services import RedisServer
from tests.serving.gateway.limits.limit_clients import TOKENS

ROOT = Path(__file__).resolve().parents[4]
CLIENTS, SECONDS, WINDOW, LIMIT, SLOTS = 100, 2.5, 1.0, 40, 12


@pytest.mark.redis
async def test_two_processes_never_get_more_than_the_limit(redis_server: RedisServer, redis_link: RedisLink) -> None:
    arguments = [redis_server.url, *map(str, (CLIENTS, SECONDS, WINDOW, LIMIT, SLOTS))]
    command = [sys.executable, "-m", "tests.serving.gateway.limits.limit_clients", *arguments]
    processes = [
        await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE) for _ in range(2)
    ]
    outputs = await asyncio.gather(*(process.communicate() for process in processes))
    assert [process.returncode for process in processes] == [0, 0]
    seen = [json.loads(stdout) for stdout, _ in outputs]
    admitted = [(before, after) for each in seen for before, after in each["admitted"]]
    held = [(start, end) for each in seen for start, end in each["held"]]
    assert all(each["admitted"] and each["refused"] for each in seen)

    # Redis decided somewhere between the two times. Those that lie wholly within one window's length were surely in one window.
    for start, _ in admitted:
        surely = sum(start <= before and after < start + WINDOW for before, after in admitted)
        assert surely <= LIMIT
    for moment, _ in held:
        assert sum(start <= moment < end for start, end in held) <= SLOTS

    # Thousands of refusals later, a window that has passed has room for exactly the limit.
    store = RedisLimitStore(redis_link, window_s=WINDOW)
    await asyncio.sleep(WINDOW * 1.1)
    subject = Subject("key:shared", 10**6, LIMIT * TOKENS, 10**6)
    verdicts = [await store.admit(Reservation(f"after-{n}", "acme", [subject], TOKENS)) for n in range(LIMIT)]
    assert all(verdict.allowed for verdict in verdicts)


@pytest.mark.redis
async def test_everything_in_redis_expires(redis_link: RedisLink, redis_server: RedisServer) -> None:
    store = RedisLimitStore(redis_link, window_s=0.5, lease_s=0.5)
    subjects = [Subject("key:a", 10, 100, 5), Subject("tenant:acme", 10, 100, 5)]
    for number in range(4):
        await store.admit(Reservation(f"r{number}", "acme", subjects, 10))
    await store.renew([Reservation("r1", "acme", subjects, 10)])
    await store.settle(Reservation("r2", "acme", subjects, 10), 5)
    keys: list[bytes] = await redis_link.redis.keys("*")  # type: ignore[assignment]  # no decoding is configured
    assert len(keys) == 3 + 2 * 5
    tags = {key.split(b"{")[1].split(b"}")[0] for key in keys}
    assert len(tags) == 1
    for key in keys:
        assert 0 < await redis_link.redis.pttl(key) <= 10_000


@pytest.mark.redis
async def test_scripts_are_sent_again_to_a_redis_that_forgot_them(redis_link: RedisLink) -> None:
    store = RedisLimitStore(redis_link)
    request = Reservation("r", "acme", [Subject("key:a", 2, 100, 1)], 10)
    for _ in range(2):
        await redis_link.redis.script_flush()
        assert (await store.admit(request)).allowed
        await redis_link.redis.script_flush()
        await store.renew([request])
        await redis_link.redis.script_flush()
        await store.settle(request, 5)
    assert redis_link.available
