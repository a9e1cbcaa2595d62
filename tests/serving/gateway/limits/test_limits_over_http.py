"""Limits as clients see them, through a whole gateway: headers on every answer, and refusals with the right time to wait."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import cast

import httpx
import pytest

from penstock.core.gateway_config import GatewayConfig
from penstock.telemetry import metrics
from penstock.testing.fake_client import Behavior
from penstock.testing.gateway_server import MODEL, GatewayServer
from tests.services import RedisServer
from tests.serving.gateway.limits.limit_clock import until

BODY = {"model": MODEL, "prompt": "hello", "max_tokens": 4}


@pytest.fixture(params=["local", pytest.param("redis", marks=pytest.mark.redis)])
def redis_url(request: pytest.FixtureRequest) -> str | None:
    if request.param == "local":
        return None
    return cast(RedisServer, request.getfixturevalue("redis_server")).fresh()


@pytest.fixture
def server(redis_url: str | None, request: pytest.FixtureRequest) -> Iterator[GatewayServer]:
    settings = GatewayConfig(
        auth="none",
        response_cache="off",
        redis_url=redis_url,
        redis_timeout_s=10,
        redis_limits_failure="closed",
        **request.param,
    )
    with GatewayServer(settings=settings) as server:
        yield server


@pytest.mark.parametrize("server", [{"default_rpm": 3, "default_tpm": 1000}], indirect=True)
def test_requests_per_minute(server: GatewayServer) -> None:
    with httpx.Client(base_url=server.url) as client:
        answers = [client.post("/v1/completions", json=BODY) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0", "0", "0"]
    assert all(answer.headers["x-ratelimit-limit-tokens"] == "1000" for answer in answers)
    refused = answers[3]
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 0 < int(refused.headers["retry-after-ms"]) <= 60_000
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert server.recorder.value(metrics.LIMITED, "requests") == 2


@pytest.mark.parametrize("server", [{"default_tpm": 100}], indirect=True)
def test_a_request_above_the_minute(server: GatewayServer) -> None:
    with httpx.Client(base_url=server.url) as client:
        answer = client.post("/v1/completions", json=BODY | {"max_tokens": 100})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request_exceeds_limit")
        assert "retry-after" not in answer.headers
        assert client.post("/v1/completions", json=BODY).status_code == 200


@pytest.mark.parametrize("server", [{"default_concurrency": 2}], indirect=True)
async def test_slots_come_back_with_the_answer_and_with_a_disconnect(server: GatewayServer) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        # One pair after the other: a client that has its answer may ask again at once.
        for _ in range(20):
            both = await asyncio.gather(*(client.post("/v1/completions", json=BODY) for _ in range(2)))
            assert [answer.status_code for answer in both] == [200, 200]

        server.client.behavior = Behavior(hang_after=1)
        body = BODY | {"stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as one:
            assert one.status_code == 200
            async with client.stream("POST", "/v1/completions", json=body) as other:
                assert other.status_code == 200
                refused = [await client.post("/v1/completions", json=BODY) for _ in range(3)]
                assert [answer.status_code for answer in refused] == [429] * 3
                assert {answer.headers["retry-after"] for answer in refused} == {"1"}
            server.client.behavior = Behavior()
            await until(lambda: httpx.post(f"{server.url}/v1/completions", json=BODY).status_code == 200)
        await until(lambda: len(server.client.requests) > 0 and server.gateway.in_flight == 0)
        both = await asyncio.gather(*(client.post("/v1/completions", json=BODY) for _ in range(2)))
        assert [answer.status_code for answer in both] == [200, 200]
