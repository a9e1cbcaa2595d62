"""The cache as an endpoint uses it: hits, misses, coalescing, tenants, models, and no gap between in flight and kept."""

from __future__ import annotations

import asyncio
import itertools
import math
from typing import Any

import msgspec
import pytest

from penstock.core.gateway_config import GatewayConfig
from penstock.core.types import ModelInfo, SamplingParams
from penstock.serving.frontend.client import ChatPrompt, Delta, GenerationRequest
from penstock.serving.gateway.cache.flights import Flights
from penstock.serving.gateway.cache.interface import CacheOutcome, Entry
from penstock.serving.gateway.cache.memory_store import MemoryStore
from penstock.serving.gateway.cache.policy import NotCachedError, Plan
from penstock.serving.gateway.cache.replay import ReplayStream
from penstock.serving.gateway.cache.response_cache import ResponseCache, build_cache
from penstock.serving.gateway.cache.write_behind import WriteBehind
from penstock.serving.gateway.identity import Identity
from penstock.serving.gateway.results import News, Tally, merge
from penstock.serving.gateway.schemas.sampling import CacheOptions
from penstock.serving.gateway.streaming.delta_stream import DeltaStream
from penstock.serving.gateway.streaming.news_stream import NewsStream
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder
from penstock.testing.fake_client import Behavior, FakeClient

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class SlowStore:
    """A CacheStore that takes its time: `get` and `put` wait until they are let through."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.ttls: list[float] = []
        self.readable = asyncio.Event()
        self.writable = asyncio.Event()
        self.readable.set()
        self.writable.set()
        self.closed = False

    async def get(self, key: str) -> Entry | None:
        found = self.entries.get(key)
        await self.readable.wait()
        return found

    async def put(self, key: str, entry: Entry, ttl_s: float) -> None:
        await self.writable.wait()
        if entry.news[0][1].text == "bad":
            raise OSError("disk")
        self.entries[key] = entry
        self.ttls.append(ttl_s)

    async def close(self) -> None:
        self.closed = True


class Endpoint:
    """A request's way through the cache, as the gateway goes it."""

    def __init__(self, cache: ResponseCache | None = None, client: FakeClient | None = None, **settings: Any) -> None:
        self.clock = Clock()
        self.config = GatewayConfig(**settings)
        self.client = client or FakeClient()
        self.cache = cache or build_cache(self.config, Recorder(), "1")
        self.info: ModelInfo | None = None
        self.ends = 0
        self.numbers = itertools.count()

    async def plan(
        self,
        text: str = "hi",
        *,
        sampling: SamplingParams = GREEDY,
        tenant: str = "a",
        headers: dict[bytes, bytes] | None = None,
        cache: CacheOptions | None = None,
        model_name: str = "m",
    ) -> Plan:
        return self.cache.plan(
            identity=Identity(tenant=tenant, key_id="k", method="key"),
            model_name=model_name,
            info=self.info or await self.client.model_info(),
            endpoint="chat",
            prompts=[ChatPrompt([{"role": "user", "content": text}])],
            sampling=sampling,
            client_seed=sampling.seed is not None,
            cache_salt="",
            headers=[*(headers or {}).items()],
            body_cache=cache,
        )

    async def ask(self, text: str = "hi", **wishes: Any) -> tuple[CacheOutcome, str, Tally]:
        """Outcome, text and usage of one request."""
        plan = await self.plan(text, **wishes)
        entry = await self.cache.lookup(plan)
        await asyncio.sleep(0)  # limits and admission
        tally = Tally()
        entry = entry or self.cache.peek(plan)
        stream: NewsStream
        outcome: CacheOutcome
        if entry is not None:
            stream, outcome = ReplayStream(entry, tally.add), "hit"
        elif plan.key is None:
            stream, outcome = self.start(text, plan, wishes, tally.add), "bypass"
        elif (flight := self.cache.find(plan)) is not None:
            stream, outcome = flight.subscribe(tally.add, 30), "coalesced"
        else:
            flight = self.cache.open(plan, lambda on_delta: self.start(text, plan, wishes, on_delta), self.end)
            stream, outcome = flight.subscribe(tally.add, 30), "miss"
        news: list[News] = []
        async with stream:
            while await stream.wait(30) or not stream.ended:
                news += stream.take()
        return outcome, "|".join(piece.text for piece in merge(news, 8)), tally

    def start(self, text: str, plan: Plan, wishes: dict[str, Any], on_delta: Any) -> DeltaStream:
        request = GenerationRequest(
            request_id=f"r{next(self.numbers)}",
            prompt=ChatPrompt([{"role": "user", "content": text}]),
            sampling=plan.sampling(wishes.get("sampling", GREEDY)),
        )
        return DeltaStream(self.client, [request], on_delta, math.inf)

    def end(self) -> None:
        self.ends += 1

    async def outcome(self, *args: Any, **wishes: Any) -> CacheOutcome:
        return (await self.ask(*args, **wishes))[0]


async def test_the_second_request_is_a_hit_with_the_same_answer() -> None:
    end = Endpoint(client=FakeClient(Behavior(num_cached_tokens=2)))
    sampling = SamplingParams(temperature=0.0, max_tokens=6, n=2)
    missed, text, paid = await end.ask(sampling=sampling)
    assert (missed, end.ends) == ("miss", 1)
    for _ in range(3):
        hit, again, shown = await end.ask(sampling=sampling)
        assert (hit, again) == ("hit", text)
        assert shown.usage().completion_tokens == paid.usage().completion_tokens == 12
        assert shown.usage().prompt_tokens == paid.usage().prompt_tokens
        assert shown.usage().prompt_tokens_details.cached_tokens == shown.usage().prompt_tokens
    assert paid.usage().prompt_tokens_details.cached_tokens == 2
    assert len(end.client.requests) == 1
    await end.cache.close()


async def test_identical_requests_at_once_generate_once() -> None:
    end = Endpoint(client=FakeClient(Behavior(interval_s=0.001)))
    answers = await asyncio.gather(*[end.ask() for _ in range(40)])
    assert sorted(outcome for outcome, _, _ in answers) == ["coalesced"] * 39 + ["miss"]
    assert len({text for _, text, _ in answers}) == 1
    assert len(end.client.requests) == 1
    cached = [shown.usage().prompt_tokens_details.cached_tokens for _, _, shown in answers]
    assert sorted(cached)[:2] == [0, answers[0][2].usage().prompt_tokens]
    assert await end.outcome() == "hit"
    await end.cache.close()


async def test_sampled_answers_are_generated_anew() -> None:
    end = Endpoint()
    sampled = SamplingParams(max_tokens=4)
    assert [await end.outcome(sampling=sampled) for _ in range(2)] == ["bypass", "bypass"]
    seeded = SamplingParams(max_tokens=4, seed=3)
    assert [await end.outcome(sampling=seeded) for _ in range(2)] == ["miss", "hit"]
    opted = {"sampling": sampled, "cache": CacheOptions(use=True)}
    assert [await end.outcome(**opted) for _ in range(2)] == ["miss", "hit"]
    assert end.client.requests[-1].sampling.seed is not None
    await end.cache.close()


async def test_no_store_neither_reads_nor_writes_nor_joins() -> None:
    end = Endpoint(client=FakeClient(Behavior(interval_s=0.001)))
    wishes: dict[str, Any] = {"headers": {b"cache-control": b"no-store"}}
    assert await end.outcome(**wishes) == "bypass"
    outcomes = await asyncio.gather(end.outcome(), end.outcome(**wishes), end.outcome())
    assert [*outcomes] == ["miss", "bypass", "coalesced"]
    assert await end.outcome(**wishes) == "bypass"
    assert len(end.client.requests) == 4
    await end.cache.close()


async def test_no_cache_generates_anew_and_replaces_the_answer() -> None:
    end = Endpoint()
    _, old, _ = await end.ask()
    end.client.behavior = Behavior(reply="new")
    wishes: dict[str, Any] = {"headers": {b"cache-control": b"no-cache"}}
    assert (await end.ask(**wishes))[:2] == ("miss", "new")
    assert (await end.ask())[:2] == ("hit", "new")
    assert old != "new"
    # It does not join what is in flight; others may join it.
    end.client.behavior = Behavior(interval_s=0.001)
    outcomes = await asyncio.gather(end.outcome("x"), end.outcome("x", **wishes), end.outcome("x"))
    assert [*outcomes] == ["miss", "miss", "coalesced"]
    await end.cache.close()


async def test_max_age_and_only_if_cached() -> None:
    clock = Clock()
    recorder = Recorder()
    config = GatewayConfig()
    cache = ResponseCache(MemoryStore(10**6, recorder), Flights(), config, "1", clock=clock)
    end = Endpoint(cache)
    only: dict[str, Any] = {"headers": {b"cache-control": b"only-if-cached"}}
    with pytest.raises(NotCachedError) as caught:
        await end.ask(**only)
    assert (caught.value.status, caught.value.code) == (504, "not_cached")
    with pytest.raises(NotCachedError):
        await end.ask(headers={b"cache-control": b"only-if-cached, no-store"})
    with pytest.raises(NotCachedError):
        await end.ask(sampling=SamplingParams(max_tokens=2), **only)
    await end.ask()
    assert end.client.requests[1:] == []
    assert await end.outcome(**only) == "hit"
    key = (await end.plan()).key
    assert key is not None
    entry = await cache.lookup(await end.plan())
    assert entry is not None
    clock.now = entry.created_at + 10
    assert await end.outcome(headers={b"cache-control": b"max-age=11"}) == "hit"
    with pytest.raises(NotCachedError):
        await end.ask(headers={b"cache-control": b"max-age=10, only-if-cached"})
    assert await end.outcome(headers={b"cache-control": b"max-age=10"}) == "miss"
    await cache.close()


async def test_time_to_live_is_the_requests_or_the_operators() -> None:
    store = SlowStore()
    recorder = Recorder()
    config = GatewayConfig(response_cache_ttl_s=77.0)
    end = Endpoint(ResponseCache(WriteBehind(store, recorder), Flights(), config, "1"))
    await end.ask("one")
    await end.ask("two", cache=CacheOptions(ttl=5.0))
    await end.cache.close()
    assert store.ttls == [77.0, 5.0]
    assert store.closed


async def test_tenants_never_see_each_others_answers() -> None:
    end = Endpoint(client=FakeClient(Behavior(interval_s=0.001)))
    outcomes = await asyncio.gather(*[end.outcome(tenant=tenant) for tenant in ("a", "b", "", "a")])
    assert [*outcomes] == ["miss", "miss", "miss", "coalesced"]
    assert await end.outcome(tenant="c") == "miss"
    assert await end.outcome(tenant="a") == "hit"
    await end.cache.close()


async def test_tenants_share_when_the_operator_says_so() -> None:
    end = Endpoint(client=FakeClient(Behavior(interval_s=0.001)), response_cache_shared=True)
    assert [*await asyncio.gather(end.outcome(tenant="a"), end.outcome(tenant="b"))] == ["miss", "coalesced"]
    assert await end.outcome(tenant="c") == "hit"
    await end.cache.close()


@pytest.mark.parametrize("changed", ["model_hash", "tokenizer_hash", "template_hash", "dtype", "weights"])
async def test_a_changed_model_never_answers_from_old_entries(changed: str) -> None:
    end = Endpoint()
    await end.ask()
    end.info = msgspec.structs.replace(await end.client.model_info(), **{changed: "new"})
    assert await end.outcome() == "miss"
    end.info = None
    assert await end.outcome() == "hit"
    await end.cache.close()


async def test_an_answer_of_a_model_that_came_after_the_plan_is_not_kept() -> None:
    """The engine was restarted with another model while the request waited for it."""
    end = Endpoint()
    old = await end.client.model_info()
    new = msgspec.structs.replace(old, model_hash="new")

    async def generate(model_now: ModelInfo) -> None:
        async def model_info() -> ModelInfo:
            return model_now

        plan = await end.plan()
        flight = end.cache.open(plan, lambda on_delta: end.start("hi", plan, {}, on_delta), end.end, model_info)
        async with flight.subscribe(lambda prompt, delta: None, 30) as stream:
            while await stream.wait(30) or not stream.ended:
                stream.take()

    await generate(new)
    assert await end.cache.lookup(await end.plan()) is None
    await generate(old)
    assert await end.cache.lookup(await end.plan()) is not None
    await end.cache.close()


async def test_another_version_or_name_never_answers_from_old_entries() -> None:
    store, recorder, config = SlowStore(), Recorder(), GatewayConfig()
    caches = [ResponseCache(WriteBehind(store, recorder), Flights(), config, version) for version in ("1", "2")]
    old, new = Endpoint(caches[0]), Endpoint(caches[1])
    await old.ask()
    await old.cache.close()
    assert await new.outcome() == "miss"
    assert await new.outcome(model_name="other") == "miss"
    assert await new.outcome() == "hit"
    await new.cache.close()


async def test_nothing_is_cached_or_shared_when_it_is_off_or_the_model_is_unknown() -> None:
    end = Endpoint(client=FakeClient(Behavior(interval_s=0.001)), response_cache="off")
    assert [*await asyncio.gather(end.outcome(), end.outcome())] == ["bypass", "bypass"]
    with pytest.raises(NotCachedError):
        await end.ask(headers={b"cache-control": b"only-if-cached"})
    with pytest.raises(ValueError, match="bypasses"):
        end.cache.open(Plan(None), lambda on_delta: end.start("x", Plan(None), {}, on_delta), end.end)
    await end.cache.close()
    cache = build_cache(GatewayConfig(), Recorder(), "1")
    plan = cache.plan(
        identity=Identity(tenant="", key_id="", method="none"),
        model_name="m",
        info=None,
        endpoint="chat",
        prompts=[],
        sampling=GREEDY,
        client_seed=False,
        cache_salt="",
        headers=[],
        body_cache=None,
    )
    assert plan.key is None
    await cache.close()


async def test_no_second_generation_between_in_flight_and_kept() -> None:
    """The first answer is completed while the second request waits for a slow store that knew nothing when it was asked."""
    store, recorder = SlowStore(), Recorder()
    end = Endpoint(ResponseCache(WriteBehind(store, recorder), Flights(), GatewayConfig(), "1"))
    store.readable.clear()
    store.writable.clear()
    second = asyncio.create_task(end.ask())
    await asyncio.sleep(0)
    first_plan = await end.plan()
    flight = end.cache.open(first_plan, lambda on_delta: end.start("hi", first_plan, {}, on_delta), end.end)
    tally = Tally()
    async with flight.subscribe(tally.add, 30) as stream:
        while await stream.wait(30) or not stream.ended:
            stream.take()
    assert not store.entries
    store.readable.set()
    assert (await second)[0] == "hit"
    # And while the answer waits to be written.
    assert await end.outcome() == "hit"
    assert len(end.client.requests) == 1
    store.writable.set()
    await end.cache.close()
    assert len(store.entries) == 1


async def test_a_store_that_is_full_or_fails_costs_only_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    store, recorder = SlowStore(), Recorder()
    end = Endpoint(ResponseCache(WriteBehind(store, recorder, max_waiting=2), Flights(), GatewayConfig(), "1"))
    store.writable.clear()
    for number in range(5):
        assert await end.outcome(str(number)) == "miss"
    assert recorder.value(metrics.CACHE_DROPPED_WRITES) == 3
    store.writable.set()
    end.client.behavior = Behavior(reply="bad")
    await asyncio.sleep(0.01)
    assert await end.outcome("bad one") == "miss"
    end.client.behavior = Behavior()
    assert await end.outcome("good one") == "miss"
    await end.cache.close()
    assert recorder.value(metrics.CACHE_DROPPED_WRITES) == 4
    assert len(store.entries) == 3
    assert "could not be written" in caplog.text


async def test_closing_writes_what_waits_but_not_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    store, recorder = SlowStore(), Recorder()
    behind = WriteBehind(store, recorder, drain_timeout_s=0.05)
    end = Endpoint(ResponseCache(behind, Flights(), GatewayConfig(), "1"))
    store.writable.clear()
    await end.ask("one")
    await end.ask("two")
    await end.cache.close()
    await end.cache.close()
    assert store.closed
    assert recorder.value(metrics.CACHE_DROPPED_WRITES) == 2
    assert "2 answers could not be written" in caplog.text


async def test_a_bound_in_bytes_holds_for_what_waits_and_for_what_is_fresh() -> None:
    store, recorder, clock = SlowStore(), Recorder(), Clock()
    store.writable.clear()
    delta = Delta(0, "x" * 1000, [], 0, 0, 0, finish_reason="stop")
    entry = Entry(0.0, [(0, delta)])
    behind = WriteBehind(store, recorder, max_bytes=5000, clock=clock)
    for number in range(10):
        behind.put_nowait(str(number), entry, 1.0)
    kept = [number for number in range(10) if behind.peek(str(number)) is not None]
    assert kept == [8, 9]
    assert recorder.value(metrics.CACHE_DROPPED_WRITES) == 8
    assert await behind.get("0") is entry
    # The same key again takes the place of the old answer.
    behind.put_nowait("0", entry, 1.0)
    assert recorder.value(metrics.CACHE_DROPPED_WRITES) == 8
    clock.now += 3
    assert behind.peek("9") is None
    waiting = asyncio.create_task(behind.written("0", 20))
    await asyncio.sleep(0)
    store.writable.set()
    await waiting
    assert store.entries["0"] is entry
    await behind.written("0", 20)
    await behind.close()


async def test_a_failed_generation_is_not_kept() -> None:
    end = Endpoint(client=FakeClient(Behavior(error=RuntimeError("x"), error_after=2)))
    with pytest.raises(Exception, match="failed"):
        await end.ask()
    end.client.behavior = Behavior()
    assert await end.outcome() == "miss"
    await end.cache.close()


async def test_a_replay_does_not_wear_out() -> None:
    news: list[News] = [(0, Delta(0, "ab", [1, 2], 0, 2, 3, finish_reason="stop"))]
    entry = Entry(0.0, news)
    for _ in range(2):
        told: list[News] = []
        async with ReplayStream(entry, lambda prompt, delta: told.append((prompt, delta))) as stream:  # noqa: B023
            assert stream.ended
            assert await stream.wait(1)
            await stream.gather(1)
            taken = stream.take()
            assert taken == told == news
            taken.clear()
            assert not await stream.wait(1)
            assert stream.take() == []
