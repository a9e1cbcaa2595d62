"""One request through identity, limits, response cache, admission and ledger, over real HTTP: who pays what, and what the answer says."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from penstock.core.config import ServerConfig
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.identity import RateLimits
from penstock.serving.gateway.services import Services, build_services
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder
from penstock.testing.accounts import FakeKeys, FakeUsage
from penstock.testing.fake_client import Behavior
from penstock.testing.gateway_server import MODEL, GatewayServer, error_of

SETTINGS = GatewayConfig(auth="keys", max_inflight_requests=4)


class Bench:
    """A server with keys, limits, cache and a ledger that can be read."""

    def __init__(self) -> None:
        self.keys = FakeKeys()
        self.usage = FakeUsage()
        config = ServerConfig(port=0, drain_timeout_s=1, request_timeout_s=20)
        self.server = GatewayServer(config, settings=SETTINGS, services=self._services)

    def _services(self, recorder: Recorder) -> Services:
        services = build_services(SETTINGS, recorder, "1")
        services.keys, services.usage = self.keys, self.usage
        return services

    def ask(self, key: str, prompt: str = "abc", **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}", **more.pop("headers", {})}
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0, **more}
        return httpx.post(self.server.url + "/v1/completions", json=body, headers=headers, timeout=20)

    def settled(self, count: int) -> list[Any]:
        """The ledger's records, once there are `count`."""
        deadline = time.monotonic() + 10
        while len(self.usage.records) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(self.usage.records) == count
        return self.usage.records


@pytest.fixture(scope="module")
def shared_bench() -> Iterator[Bench]:
    bench = Bench()
    with bench.server:
        yield bench


@pytest.fixture
def bench(shared_bench: Bench) -> Bench:
    shared_bench.server.client.behavior = Behavior()
    shared_bench.server.client.requests.clear()
    shared_bench.usage.records.clear()
    return shared_bench


def cache_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-penstock-cache"]


def text_of(answer: httpx.Response) -> str:
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_the_second_time_the_cache_answers(bench: Bench) -> None:
    key = bench.keys.add("a1")
    first, second = bench.ask(key), bench.ask(key)
    assert (cache_of(first), cache_of(second)) == ("miss", "hit")
    assert text_of(first) == text_of(second)
    assert first.json()["id"] != second.json()["id"]
    usage = second.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]
    assert len(bench.server.client.requests) == 1
    miss, hit = bench.settled(2)
    assert (miss.cache, hit.cache) == ("miss", "hit")
    assert hit.output_tokens == 8
    assert hit.cached_tokens == hit.prompt_tokens == miss.prompt_tokens


def test_a_hit_is_streamed_to_a_client_that_streams(bench: Bench) -> None:
    key = bench.keys.add("a2")
    whole = text_of(bench.ask(key))
    streamed = bench.ask(key, stream=True)
    assert cache_of(streamed) == "hit"
    events = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == whole


@pytest.mark.parametrize(
    ("more", "outcome"),
    [
        ({"temperature": 0.7}, "bypass"),
        ({"temperature": 0.7, "seed": 3}, "miss"),
        ({"headers": {"Cache-Control": "no-store"}}, "bypass"),
        ({"headers": {"Cache-Control": "no-cache"}}, "miss"),
        ({"cache": {"use": False}}, "bypass"),
    ],
)
def test_what_may_be_cached(bench: Bench, more: dict[str, Any], outcome: str) -> None:
    key = bench.keys.add(f"b {more}")
    assert cache_of(bench.ask(key, **dict(more))) == outcome


def test_no_tenant_sees_what_another_asked(bench: Bench) -> None:
    ours, theirs = bench.keys.add("c1"), bench.keys.add("c2")
    assert cache_of(bench.ask(ours)) == "miss"
    assert cache_of(bench.ask(theirs)) == "miss"
    assert cache_of(bench.ask(bench.keys.add("c1"))) == "hit"
    assert {request.tenant for request in bench.server.client.requests} == {"c1", "c2"}


def test_identical_requests_in_flight_share_one_generation(bench: Bench) -> None:
    key = bench.keys.add("d1")
    bench.server.client.behavior = Behavior(first_delay_s=0.3, interval_s=0.02)
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda _: bench.ask(key), range(5)))
    assert sorted(cache_of(answer) for answer in answers) == ["coalesced"] * 4 + ["miss"]
    assert len({text_of(answer) for answer in answers}) == 1
    assert len(bench.server.client.requests) == 1
    records = bench.settled(5)
    assert sorted(record.cache for record in records) == ["coalesced"] * 4 + ["miss"]
    assert {record.output_tokens for record in records} == {8}


async def test_when_the_leader_leaves_the_others_live_on(bench: Bench) -> None:
    key = bench.keys.add("d2")
    bench.server.client.behavior = Behavior(first_delay_s=0.2, interval_s=0.05)
    headers = {"Authorization": f"Bearer {key}"}
    body = {"model": MODEL, "prompt": "xyz", "max_tokens": 12, "temperature": 0, "stream": True}
    async with httpx.AsyncClient(base_url=bench.server.url, timeout=20) as http:
        leading = asyncio.create_task(http.post("/v1/completions", json=body, headers=headers))
        await asyncio.sleep(0.1)
        following = asyncio.create_task(http.post("/v1/completions", json={**body, "stream": False}, headers=headers))
        await asyncio.sleep(0.3)
        leading.cancel()
        answer = await following
    assert answer.status_code == 200
    assert text_of(answer) == "xyz" * 4
    assert len(bench.server.client.requests) == 1
    records = bench.settled(2)
    leader = next(record for record in records if record.outcome == "cancelled")
    follower = next(record for record in records if record.outcome == "completed")
    assert leader.cache == follower.cache == "miss"
    assert leader.output_tokens < follower.output_tokens == 12


def test_requests_per_minute(bench: Bench) -> None:
    key = bench.keys.add("e1", limits=RateLimits(requests_per_minute=2))
    first, second = bench.ask(key), bench.ask(key)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in (first, second)] == ["1", "0"]
    refused = bench.ask(key)
    assert refused.status_code == 429
    assert error_of(refused)["code"] == "rate_limit_exceeded"
    assert 55 <= int(refused.headers["retry-after"]) <= 60
    assert int(refused.headers["retry-after-ms"]) <= 60_000
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    # The next one is refused before its body is read.
    early = httpx.post(
        bench.server.url + "/v1/completions", content=b"no JSON", headers={"Authorization": f"Bearer {key}"}
    )
    assert early.status_code == 429
    assert len(bench.settled(2)) == 2


def test_a_hit_costs_no_tokens(bench: Bench) -> None:
    key = bench.keys.add("e2", limits=RateLimits(tokens_per_minute=30))
    prompt = "token"
    assert cache_of(bench.ask(key, prompt, max_tokens=16)) == "miss"
    assert [cache_of(bench.ask(key, prompt, max_tokens=16)) for _ in range(5)] == ["hit"] * 5
    assert bench.ask(key, "other", max_tokens=16).status_code == 429


def test_more_than_a_minute_has_is_a_400_without_retry(bench: Bench) -> None:
    key = bench.keys.add("e3", limits=RateLimits(tokens_per_minute=10))
    answer = bench.ask(key, max_tokens=100)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "request_exceeds_limit"
    assert "retry-after" not in answer.headers


def test_a_concurrency_slot_comes_back(bench: Bench) -> None:
    key = bench.keys.add("e4", limits=RateLimits(concurrency=1))
    bench.server.client.behavior = Behavior(first_delay_s=0.5)
    running = threading.Thread(target=lambda: bench.ask(key, "slow"))
    running.start()
    time.sleep(0.2)
    assert bench.ask(key, "second").status_code == 429
    running.join()
    bench.server.client.behavior = Behavior()
    deadline = time.monotonic() + 5
    while (answer := bench.ask(key, "third")).status_code == 429 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert answer.status_code == 200


def test_a_key_over_its_budget_is_stopped(bench: Bench) -> None:
    answer = bench.ask(bench.keys.add("f1", over_budget=True))
    assert answer.status_code == 429
    assert error_of(answer)["code"] == "insufficient_quota"
    assert "retry-after" not in answer.headers


def test_a_model_that_is_not_allowed_does_not_exist(bench: Bench) -> None:
    key = bench.keys.add("f2", models=frozenset({"another"}))
    answer = bench.ask(key)
    assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found")
    listed = httpx.get(bench.server.url + "/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert listed.json()["data"] == []


def test_a_full_engine_refuses_and_a_hit_is_still_served(bench: Bench) -> None:
    key = bench.keys.add("g1")
    assert cache_of(bench.ask(key, "known")) == "miss"
    bench.server.client.behavior = Behavior(first_delay_s=1.0)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(bench.ask, bench.keys.add(f"g1 {number}"), f"slow {number}") for number in range(4)]
        time.sleep(0.5)
        assert cache_of(bench.ask(key, "known")) == "hit"
        refused = bench.ask(key, "unknown")
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        # Nothing could answer this one from a cache: it is refused without reading it.
        unread = bench.ask(key, "unknown", headers={"Cache-Control": "no-store"})
        assert unread.status_code == 503
        assert [answer.result().status_code for answer in waiting] == [200] * 4
    assert bench.server.recorder.value(metrics.INFLIGHT_TOKENS, MODEL) == 0


@pytest.mark.parametrize("where", ["header", "body"])
def test_a_deadline_of_the_client(bench: Bench, where: str) -> None:
    key = bench.keys.add(f"h1 {where}")
    bench.server.client.behavior = Behavior(interval_s=0.1)
    more: dict[str, Any] = {"headers": {"X-Request-Timeout": "0.25"}} if where == "header" else {"timeout": 0.25}
    answer = bench.ask(key, max_tokens=100, **more)
    assert (answer.status_code, error_of(answer)["code"]) == (504, "deadline_exceeded")
    (record,) = bench.settled(1)
    assert record.outcome == "cancelled"
    assert 0 < record.output_tokens < 100


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf", "0"])
def test_a_deadline_that_is_none(bench: Bench, value: str) -> None:
    answer = bench.ask(bench.keys.add("h2"), headers={"X-Request-Timeout": value})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "X-Request-Timeout")


def test_an_engine_error_costs_no_tokens_and_is_not_cached(bench: Bench) -> None:
    from penstock.core.errors import EngineError

    key = bench.keys.add("i1", limits=RateLimits(tokens_per_minute=40))
    bench.server.client.behavior = Behavior(error=EngineError("broken"), error_after=3)
    assert bench.ask(key, max_tokens=16).status_code == 500
    bench.server.client.behavior = Behavior()
    answer = bench.ask(key, max_tokens=16)
    assert cache_of(answer) == "miss"
    assert len(bench.settled(1)) == 1


def test_urgency_is_the_keys(bench: Bench) -> None:
    key = bench.keys.add("j1", priority=5)
    bench.ask(key, "urgent", priority=-10)
    bench.ask(key, "patient", priority=3)
    assert [request.priority for request in bench.server.client.requests] == [5, 8]


def test_every_answer_says_how_long_it_took(bench: Bench) -> None:
    answer = bench.ask(bench.keys.add("k1"))
    assert 0 < float(answer.headers["x-request-latency"].removesuffix("s")) < 20
    assert "x-request-latency" in httpx.get(bench.server.url + "/health/live").headers
