"""Answers in a real Redis: whole, typed, bounded, and never believed when somebody else wrote them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from penstock.core.gateway_config import GatewayConfig
from penstock.core.types import SamplingParams
from penstock.serving.frontend.client import Delta, GenerationRequest, TextPrompt, TokenLogprob, TopLogprob
from penstock.serving.gateway.cache.interface import Entry
from penstock.serving.gateway.cache.redis_store import CORRUPT, FORMAT, RedisStore
from penstock.serving.gateway.cache.replay import join
from penstock.serving.gateway.cache.response_cache import ResponseCache, build_cache
from penstock.serving.gateway.identity import Identity
from penstock.serving.gateway.results import News
from penstock.serving.gateway.stores.redis_link import STORE, RedisLink
from penstock.serving.gateway.streaming.delta_stream import DeltaStream
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder
from penstock.testing.fake_client import Behavior, FakeClient
from tests.services import RedisServer

pytestmark = pytest.mark.redis

Connect = Callable[[], RedisLink]
KEY = "0123456789abcdef" * 4
NAME = f"penstock:rc:{{{KEY}}}"
LOGPROB = TokenLogprob(7, "�", b"\xff\x00", -0.25, (TopLogprob(8, "x", b"x", -1.5), TopLogprob(9, "", b"", -math.inf)))
DELTA = Delta(
    index=0,
    text="€ and more",
    token_ids=[7, 8],
    offset=0,
    num_output_tokens=2,
    num_prompt_tokens=3,
    num_cached_tokens=3,
    logprobs=[LOGPROB, LOGPROB],
    prompt_token_ids=[1, 2, 3],
    prompt_logprobs=[TokenLogprob(1, "a", b"a", None), LOGPROB, LOGPROB],
    finish_reason="stop",
    stop_reason="END",
)
ENTRY = Entry(1234.5, [(0, DELTA), (0, Delta(1, "", [], 0, 0, 3, 3, finish_reason="length", stop_reason=5))])


async def test_an_answer_comes_back_as_it_was(redis_links: Connect) -> None:
    link, recorder = redis_links(), Recorder()
    store = RedisStore(link, recorder)
    assert await store.get(KEY) is None
    await store.put(KEY, ENTRY, 60.0)
    assert await RedisStore(redis_links(), recorder).get(KEY) == ENTRY
    assert 59_000 < await link.redis.pttl(NAME) <= 60_000
    assert await link.redis.keys("*") == [NAME.encode()]
    assert not list(recorder.values(metrics.STORE_ERRORS))


async def test_an_answer_goes_when_its_time_is_over(redis_links: Connect) -> None:
    store = RedisStore(redis_links(), Recorder())
    await store.put(KEY, ENTRY, 0.02)
    await asyncio.sleep(0.05)
    assert await store.get(KEY) is None


async def test_an_answer_that_is_too_large_is_not_kept(redis_links: Connect) -> None:
    link = redis_links()
    store = RedisStore(link, Recorder(), max_value_bytes=1000)
    await store.put(KEY, Entry(1.0, [(0, DELTA)] * 50), 60.0)
    assert await link.redis.keys("*") == []


def value_of(value: Any) -> bytes:
    return FORMAT + msgspec.msgpack.encode(value)


def changed(**changes: Any) -> bytes:
    """A value whose first delta was changed."""
    value: Any = msgspec.msgpack.decode(msgspec.msgpack.encode([KEY, ENTRY]))
    value[1][1][0][1] = {**value[1][1][0][1], **changes}
    return value_of(value)


@pytest.mark.parametrize(
    "value",
    [
        FORMAT,
        b"\x80\x04\x95",
        b"\xff" * 100,
        b"\x02" + value_of([KEY, ENTRY])[1:],
        value_of([KEY, ENTRY])[:-1],
        value_of([KEY, ENTRY]) + b"\x00",
        value_of(ENTRY),
        value_of({"key": KEY, "entry": ENTRY}),
        value_of(["f" * 64, ENTRY]),
        value_of([KEY, Entry(1.0, [])]),
        value_of([KEY, Entry(math.nan, ENTRY.news)]),
        value_of([KEY, Entry(1.0, ENTRY.news[::-1])]),
        value_of([KEY, Entry(1.0, ENTRY.news[:1] * 2)]),
        value_of([KEY, Entry(1.0, [(-1, DELTA)])]),
        changed(text=b"bytes"),
        changed(token_ids=["1"]),
        changed(token_ids={"1": 1}),
        changed(num_output_tokens=1.5),
        changed(index=True),
        changed(finish_reason=None),
        changed(finish_reason="error"),
        changed(finish_reason="anything"),
        changed(logprobs=[1]),
        b"x" * 5000,
    ],
)
async def test_a_value_that_somebody_else_wrote_is_a_miss_and_deleted(redis_links: Connect, value: bytes) -> None:
    link, recorder = redis_links(), Recorder()
    store = RedisStore(link, recorder, max_value_bytes=4000)
    await link.redis.set(NAME, value)
    assert await store.get(KEY) is None
    assert not await link.redis.exists(NAME)
    assert recorder.value(metrics.STORE_ERRORS, STORE, CORRUPT) == 1
    assert link.available
    await store.put(KEY, ENTRY, 60.0)
    assert await store.get(KEY) == ENTRY


async def test_a_value_of_another_type_is_a_miss_and_redis_is_well(redis_links: Connect) -> None:
    link, recorder = redis_links(), Recorder()
    store = RedisStore(link, recorder)
    await link.redis.rpush(NAME, "x")
    assert await store.get(KEY) is None
    assert not await link.redis.exists(NAME)
    assert recorder.value(metrics.STORE_ERRORS, STORE, CORRUPT) == 1
    assert link.available


class Gateway:
    """One gateway process with a cache in Redis."""

    def __init__(self, link: RedisLink, **behavior: Any) -> None:
        self.recorder = Recorder()
        self.cache: ResponseCache = build_cache(GatewayConfig(redis_url="redis://x"), self.recorder, "1", redis=link)
        self.client = FakeClient(Behavior(**behavior))

    async def ask(self, text: str = "hi") -> tuple[str, list[News]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=8)
        plan = self.cache.plan(
            identity=Identity(tenant="a", key_id="k", method="key"),
            model_name="m",
            info=await self.client.model_info(),
            endpoint="completions",
            prompts=[TextPrompt(text)],
            sampling=sampling,
            client_seed=False,
            cache_salt="",
            headers=[],
            body_cache=None,
        )
        entry = await self.cache.lookup(plan)
        if entry is not None:
            return "hit", entry.news
        request = GenerationRequest(request_id=f"r{id(plan)}", prompt=TextPrompt(text), sampling=sampling)
        flight = self.cache.find(plan) or self.cache.open(
            plan, lambda on_delta: DeltaStream(self.client, [request], on_delta, math.inf), lambda: None
        )
        news: list[News] = []
        async with flight.subscribe(lambda prompt, delta: None, 30) as stream:
            while await stream.wait(30) or not stream.ended:
                news += stream.take()
        return stream.role, join(news)


async def test_gateways_on_one_redis_answer_from_each_others_generations(redis_links: Connect) -> None:
    gateways = [Gateway(redis_links(), interval_s=0.002) for _ in range(3)]
    answers = await asyncio.gather(*[gateway.ask() for gateway in gateways for _ in range(5)])
    assert [role for role, _ in answers].count("leader") == 1
    assert len({news[0][1].text for _, news in answers}) == 1
    for gateway in gateways:
        outcome, news = await gateway.ask()
        assert outcome in ("hit", "follower")
        assert news[0][1].text == answers[0][1][0][1].text
    assert sum(len(gateway.client.requests) for gateway in gateways) == 1
    for gateway in gateways:
        await gateway.cache.close()
    assert (await Gateway(redis_links()).ask())[0] == "hit"


async def test_one_after_the_other_there_is_never_a_second_generation(redis_links: Connect) -> None:
    """Generations without a duration: the claim, the write behind and the look-up meet in every order."""
    gateways = [Gateway(redis_links()) for _ in range(2)]
    for number in range(40):
        await asyncio.gather(*[gateway.ask(str(number)) for gateway in gateways for _ in range(3)])
    assert sum(len(gateway.client.requests) for gateway in gateways) == 40
    for gateway in gateways:
        await gateway.cache.close()


async def test_without_redis_every_request_is_a_miss_and_is_answered(redis_server: RedisServer) -> None:
    redis_server.fresh()
    link = RedisLink(redis_server.url, Recorder(), timeout_s=1.0)
    gateway = Gateway(link)
    assert (await gateway.ask("first"))[0] == "leader"
    redis_server.stop()
    try:
        assert (await gateway.ask("second"))[0] == "leader"
        assert (await gateway.ask("third"))[0] == "leader"
    finally:
        redis_server.start()
    async with asyncio.timeout(30):
        while not link.available:  # noqa: ASYNC110  # the link has no event for it
            await asyncio.sleep(0.05)
    assert (await gateway.ask("fourth"))[0] == "leader"
    await gateway.cache.close()
    assert (await Gateway(link).ask("fourth"))[0] == "hit"
    await link.close()
