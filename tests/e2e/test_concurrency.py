"""Many clients at once, over real HTTP: everybody gets the answer of a solo run, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from penstock.testing.server import RunningServer

CHARACTERS = ["fox", "bear", "rabbit", "owl", "mouse", "lion", "turtle", "squirrel"]
MORALS = ["honesty", "kindness", "courage", "patience", "sharing", "gratitude", "teamwork", "humility"]


def prompt(number: int) -> list[ChatCompletionMessageParam]:
    character, moral = CHARACTERS[number % 8], MORALS[number // 8 % 8]
    text = f"Write a single paragraph moral story for children about a {character} who learns the value of {moral} in a forest."
    return [{"role": "user", "content": text}]


def make_client(server: RunningServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        default_headers={"Cache-Control": "no-store"},
        timeout=120,
    )


async def stream_story(client: openai.AsyncOpenAI, number: int, max_tokens: int) -> tuple[str, str | None, int]:
    """Text, finish reason and completion tokens of one streamed chat completion: greedy or, every other one, sampled."""
    text, reason, tokens = "", None, 0
    stream = await client.chat.completions.create(
        model="stories",
        messages=prompt(number),
        temperature=0.9 * (number % 2),
        seed=number,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
    return text, reason, tokens


async def test_64_concurrent_streams_equal_their_solo_runs(server: RunningServer) -> None:
    async with make_client(server) as client:
        solo = [await stream_story(client, number, 24) for number in range(64)]
        together = await asyncio.gather(*(stream_story(client, number, 24) for number in range(64)))
    assert together == solo
    assert all(reason in ("length", "stop") and tokens > 0 for _, reason, tokens in together)
    assert len({text for text, _, _ in together}) > 8, "different prompts, different stories"


@pytest.mark.timeout(300)
async def test_1000_mixed_requests_with_random_disconnects_leave_nothing(server: RunningServer) -> None:
    rng = random.Random(5)
    slots = asyncio.Semaphore(32)
    outcomes = {"done": 0, "left": 0, "refused": 0}

    async def one(client: openai.AsyncOpenAI, number: int) -> None:
        async with slots:
            kind = rng.random()
            if kind < 0.1:
                with pytest.raises(openai.BadRequestError):
                    await client.completions.create(model="stories", prompt="x" * 20, max_tokens=10**6)
                outcomes["refused"] += 1
            elif kind < 0.4:
                await leave_early(client, number, rng.random() * 0.2)
                outcomes["left"] += 1
            elif kind < 0.7:
                answer = await client.completions.create(
                    model="stories", prompt="The fox", max_tokens=rng.randint(1, 12), n=rng.randint(1, 3), seed=number
                )
                assert all(choice.finish_reason in ("stop", "length") for choice in answer.choices)
                outcomes["done"] += 1
            else:
                _, reason, _ = await stream_story(client, number, rng.randint(1, 12))
                assert reason in ("stop", "length")
                outcomes["done"] += 1

    async with make_client(server) as client:
        await asyncio.gather(*(one(client, number) for number in range(500)))
        before = server.resident_bytes()
        await asyncio.gather(*(one(client, number) for number in range(500, 1000)))
    deadline = time.monotonic() + 20
    while server.metric("penstock_engine_kv_blocks_used") > 0 and time.monotonic() < deadline:
        time.sleep(0.2)  # noqa: ASYNC251  nothing else runs here any more
    assert sum(outcomes.values()) == 1000, outcomes
    assert min(outcomes.values()) > 50, outcomes
    assert server.metric("penstock_engine_kv_blocks_used") == 0
    assert server.metric("penstock_engine_requests_running") == 0
    assert server.metric("penstock_engine_requests_waiting") == 0
    # What grows for a while is bounded: the KV cache as it is touched (51 MiB), and oneDNN's cache of compiled shapes.
    # A leak of 100 KiB per request would show.
    assert server.resident_bytes() - before < 48 * 2**20
    assert server.get("/health/ready")[0] == 200


async def leave_early(client: openai.AsyncOpenAI, number: int, after_s: float) -> None:
    """Start a stream or a plain request and drop the connection."""
    if number % 2:
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            async with asyncio.timeout(after_s):
                await client.chat.completions.create(model="stories", messages=prompt(number), max_tokens=300)
        return
    stream = await client.chat.completions.create(
        model="stories",
        messages=prompt(number),
        max_tokens=300,
        stream=True,
    )
    await asyncio.sleep(after_s)
    await stream.close()
