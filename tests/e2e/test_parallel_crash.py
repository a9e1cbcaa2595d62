"""A rank dies under load: everybody hears of it within a second, the ranks start again, and every stream goes on where it was."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from datetime import UTC, datetime
from pathlib import Path

import openai
import psutil
import pytest

from penstock.testing.server import RunningServer

STREAMS = 4
TOKENS = 700
RANK_MODULE = "penstock.execution.runner.rank_process"


def rank_pids(server: RunningServer) -> list[int]:
    """The ranks of this server, in their order."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    found = [child for child in children if RANK_MODULE in " ".join(child.cmdline())]
    return [child.pid for child in sorted(found, key=lambda child: (child.create_time(), child.pid))]


def make_client(server: RunningServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        default_headers={"Cache-Control": "no-store"},
        timeout=90,
    )


class Streams:
    """Sampled streams with fixed seeds: their texts, how far they are, and how each of them ended."""

    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self.client = client
        self.texts = [""] * STREAMS
        self.counts = [0] * STREAMS
        self.ends: list[list[str]] = [[] for _ in range(STREAMS)]

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
            for choice in chunk.choices:
                self.texts[index] += choice.text
                if choice.finish_reason is not None:
                    self.ends[index].append(choice.finish_reason)
            if chunk.usage is not None:
                self.counts[index] = chunk.usage.completion_tokens

    async def all(self) -> None:
        await asyncio.gather(*(self.one(index) for index in range(STREAMS)))


def logged_at(log: str, words: str) -> float:
    """When the line with these words was logged, in seconds since the epoch."""
    found = re.search(rf"^(\S+)Z .*{words}", log, re.MULTILINE)
    assert found is not None, log
    return datetime.fromisoformat(found[1]).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("flag", "died"),
    [
        ("--tensor-parallel-size", r"rank 1 of 2 \(tensor rank 1, stage 0\) died: killed by SIGKILL"),
        pytest.param(
            "--pipeline-parallel-size",
            r"rank 1 of 2 \(tensor rank 0, stage 1\) died: killed by SIGKILL",
            marks=pytest.mark.slow,
        ),
    ],
)
async def test_streams_continue_after_a_rank_is_killed(flag: str, died: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with RunningServer("stories", "--kv-cache-gib", "0.05", "--threads", "1", flag, "2", log=log) as server:
        async with make_client(server) as client:
            calm = Streams(client)
            await calm.all()
            rough = Streams(client)
            running = asyncio.create_task(rough.all())
            while min(rough.counts) < 3:  # noqa: ASYNC110  the counts come from several streams
                await asyncio.sleep(0.01)
            assert max(rough.counts) < TOKENS, "a rank is hit in the middle"
            before = rank_pids(server)
            assert len(before) == 2
            killed_at = time.time()
            os.kill(before[1], signal.SIGKILL)
            await running
        assert rough.texts == calm.texts, "no token lost, none doubled"
        assert rough.counts == [TOKENS] * STREAMS
        assert rough.ends == [["length"]] * STREAMS, "exactly one outcome each"
        assert logged_at(log.read_text(), died) - killed_at < 1.0
        server.wait_ready()
        after = rank_pids(server)
        assert len(after) == 2
        assert not set(after) & set(before)
        assert server.metric("penstock_engine_restarts_total") == 1
        engines = server.engine_pids()
        # While nothing runs, too.
        os.kill(after[0], signal.SIGKILL)
        deadline = time.monotonic() + 5
        while server.get("/health/ready")[0] == 200:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
    left = [pid for pid in (*before, *after, *engines) if psutil.pid_exists(pid)]
    assert left == [], "no process is left"
