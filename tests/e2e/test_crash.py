"""The engine dies or hangs under load: readiness says so, a new one takes over, and every stream goes on where it was."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path

import openai
import pytest

from penstock.testing.server import RunningServer

STREAMS = 6
TOKENS = 1500


def start(tmp_path: Path, *flags: str) -> RunningServer:
    return RunningServer("stories", "--kv-cache-gib", "0.1", "--threads", "1", *flags, log=tmp_path / "log")


def make_client(server: RunningServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        default_headers={"Cache-Control": "no-store"},
        timeout=90,
    )


class Streams:
    """Sampled streams with fixed seeds, and how far they are."""

    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self.client = client
        self.texts = [""] * STREAMS
        self.counts = [0] * STREAMS

    async def one(self, index: int) -> None:
        stream = await self.client.completions.create(
            model="stories",
            prompt=f"Story number {index}:",
            max_tokens=TOKENS,
            temperature=0.9,
            seed=index,
            stream=True,
            extra_body={
                "ignore_eos": True,
                "skip_special_tokens": False,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            },
        )
        async for chunk in stream:
            self.texts[index] += "".join(choice.text for choice in chunk.choices)
            if chunk.usage is not None:
                self.counts[index] = chunk.usage.completion_tokens

    async def all(self) -> None:
        await asyncio.gather(*(self.one(index) for index in range(STREAMS)))

    async def until_started(self) -> None:
        while min(self.counts) < 3:  # noqa: ASYNC110  the counts come from several streams
            await asyncio.sleep(0.01)


async def wait_unready(server: RunningServer) -> str:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        status, body = await asyncio.to_thread(server.get, "/health/ready")
        if status == 503:
            return body
        await asyncio.sleep(0.02)
    raise AssertionError("readiness was never off")


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
async def test_streams_continue_after_the_engine_is_killed_or_hangs(number: signal.Signals, tmp_path: Path) -> None:
    with start(tmp_path, "--hang-timeout-s", "3") as server:
        async with make_client(server) as client:
            calm = Streams(client)
            await calm.all()
            assert calm.counts == [TOKENS] * STREAMS
            rough = Streams(client)
            running = asyncio.create_task(rough.all())
            await rough.until_started()
            engines = server.engine_pids()
            assert max(rough.counts) < TOKENS, "the engine is hit in the middle"
            server.signal_engine(number)
            assert json.loads(await wait_unready(server))["error"]["code"] == "not_ready"
            await running
            assert rough.texts == calm.texts, "no token lost, none doubled"
            assert rough.counts == [TOKENS] * STREAMS
        server.wait_ready()
        assert server.engine_pids() != engines
        assert server.metric("penstock_engine_restarts_total") == 1


@pytest.mark.slow
async def test_a_request_in_two_crashes_ends_with_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With native kernels the second engine may be done before the second signal; torch's operators take milliseconds per token.
    monkeypatch.setenv("PENSTOCK_NATIVE", "0")
    with start(tmp_path) as server:
        async with make_client(server) as client:
            streams = Streams(client)
            running = asyncio.gather(*(streams.one(index) for index in range(STREAMS)), return_exceptions=True)
            await streams.until_started()
            server.signal_engine(signal.SIGKILL)
            await wait_unready(server)
            await asyncio.to_thread(server.wait_ready)
            server.signal_engine(signal.SIGKILL)
            outcomes = await running
            ended = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
            assert len(ended) == STREAMS
            assert all(isinstance(error, openai.APIError) and "crashed twice" in error.message for error in ended)
            await asyncio.to_thread(server.wait_ready)
            answer = await client.completions.create(model="stories", prompt="The fox", max_tokens=3)
            assert answer.usage is not None


async def test_an_engine_that_cannot_come_back_ends_the_server(tmp_path: Path) -> None:
    with start(tmp_path, "--max-restarts", "0") as server:
        server.signal_engine(signal.SIGKILL)
        assert await asyncio.to_thread(server.process.wait, 30) == 1
        assert "gone for good" in server.log.read_text()
