"""kill -9 of the gateway process that generates: the others finish its answer, and its claim is not left behind."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest

from penstock.core.types import SamplingParams
from penstock.serving.frontend.client import Delta, GenerationRequest, TextPrompt
from penstock.serving.gateway.cache import flight_log
from penstock.serving.gateway.cache.interface import Entry
from penstock.serving.gateway.cache.redis_flight_store import RedisFlightStore
from penstock.serving.gateway.cache.replay import join
from penstock.serving.gateway.cache.shared_flights import SharedFlights
from penstock.serving.gateway.results import News
from penstock.serving.gateway.stores.redis_link import RedisLink
from penstock.serving.gateway.streaming.delta_stream import DeltaStream
from penstock.telemetry.recorder import Recorder
from penstock.testing.fake_client import Behavior, FakeClient
from tests.services import RedisServer

pytestmark = pytest.mark.redis

TOKENS = 60
CLAIM_S = 1.0


async def nothing_kept() -> Entry | None:
    return None


async def forget(entry: Entry) -> None: ...


async def read(flights: SharedFlights, client: FakeClient, on_news: Callable[[list[News]], None]) -> list[News]:
    """One request's answer."""
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    request = GenerationRequest(request_id="r", prompt=TextPrompt("a€c"), sampling=sampling)

    def start(on_delta: Callable[[int, Delta], None]) -> DeltaStream:
        return DeltaStream(client, [request], on_delta, math.inf)

    flight = flights.open("k", start, lambda: None, forget, recheck=nothing_kept)
    news: list[News] = []
    async with flight.subscribe(lambda prompt, delta: None, 60) as stream:
        while await stream.wait(60) or not stream.ended:
            news += stream.take()
            on_news(news)
    return news


async def lead(url: str) -> None:
    """What the process does that is killed: it says when it has begun, and generates slowly."""
    link = RedisLink(url, Recorder(), timeout_s=5.0)
    client = FakeClient(Behavior(interval_s=0.1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flight_log, "CLAIM_S", CLAIM_S)
        await read(SharedFlights(RedisFlightStore(link)), client, lambda news: print(len(news), flush=True))  # noqa: T201


async def test_the_answer_of_a_killed_process_is_finished(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight_log, "CLAIM_S", CLAIM_S)
    url = redis_server.fresh()
    script = f"import asyncio; from {__name__} import lead; asyncio.run(lead({url!r}))"
    environment: dict[str, Any] = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    victim = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, env=environment
    )
    link = RedisLink(url, Recorder(), timeout_s=5.0)
    client = FakeClient()
    flights = SharedFlights(RedisFlightStore(link))
    try:
        assert victim.stdout is not None
        assert await victim.stdout.readline() == b"1\n"
        killed = False

        def kill(news: list[News]) -> None:
            nonlocal killed
            if len(news) >= 5 and not killed:
                killed = True
                assert client.requests == []
                victim.kill()

        answer = await read(flights, client, kill)
        assert killed
        [(_, whole)] = join(answer)
        assert whole.text == "a€c" * (TOKENS // 5)
        assert len(whole.token_ids) == TOKENS
        assert len(client.requests) == 1
        await flights.close()
        assert await link.redis.keys("*:owner") == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            victim.kill()
        await victim.communicate()
        await link.close()
